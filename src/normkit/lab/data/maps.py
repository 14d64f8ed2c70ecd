"""Data of semantic segmentation: scenes, Pascal VOC with SBD, and folders of pictures and maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from normkit.errors import DataError, SpecError
from normkit.lab.data.annotated import IGNORED, Annotated, Drawn, Mapped, Part, Parts, held_out
from normkit.lab.data.fingerprint import fingerprint_of_files
from normkit.lab.data.folder import PARTS as PART_NAMES
from normkit.lab.data.folder import PREFIX, SUFFIXES, decoded
from normkit.lab.data.scenes import SCENES, scenes
from normkit.lab.data.sources import data_folder
from normkit.lab.files import require_file
from normkit.text import listed, printable, shortened

if TYPE_CHECKING:
    from normkit.lab.spec import Protocol

VALIDATION_SHARE = 0.05
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
VOC_NUMBERS = (10_053, 529, 1_449)  # training pictures with SBD's, those held out of them, the test
VOC_HOLDS = "JPEGImages, SegmentationClass and ImageSets/Segmentation of VOC 2012"
SBD_HOLDS = "img, cls, train.txt and val.txt of the Semantic Boundaries Dataset"
CLASSES_FILE = "classes.txt"


def open_maps(protocol: Protocol, side: int) -> Parts[Mapped]:
    """Open what a protocol names.

    Args:
        protocol: Names the data, how many of them, and whether any are held out.
        side: Height and width of a training picture, where the data have no size of their own.

    Raises:
        NormError: If it is unknown or cannot be read.
    """
    text = protocol.data
    if text.partition(":")[0] == SCENES:
        found = _of_scenes(text)
    elif text.startswith(PREFIX):
        found = read_maps(Path(text.removeprefix(PREFIX)).expanduser(), side)
    elif text == "voc":
        found = read_voc(data_folder() / "VOC2012", data_folder() / "sbd", side)
    else:
        raise SpecError(
            f"there is no data {printable(text)!r} with maps of classes; write scenes, voc, or "
            f"folder:PATH with train/images, train/maps and {CLASSES_FILE}"
        )
    found = found.limited(protocol.limit)
    return found if protocol.hold_out else found.with_validation_in_training()


def _of_scenes(text: str) -> Parts[Mapped]:
    found = scenes(text)

    def part(own: Part[Annotated]) -> Part[Mapped]:
        return Part.of(Drawn(partial(_mapped, own), len(own)))

    return Parts(
        name=found.name,
        num_classes=found.num_classes,
        input_shape=found.input_shape,
        train=part(found.train),
        validation=part(found.validation),
        test=part(found.test),
        fingerprint=found.fingerprint,
    )


def _mapped(part: Part[Annotated], at: int) -> Mapped:
    example = part[at]
    return Mapped(picture=example.picture, classes=example.class_map())


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Pictures and maps in files.

    Args:
        files: A picture, and the file of its map.
        read: Reads a map.
        num_classes: With the background.
    """

    files: Sequence[tuple[Path, Path]]
    read: Callable[[Path], Int[Tensor, "h w"]]
    num_classes: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> Mapped:
        path, map_path = self.files[at]
        picture, classes = decoded(path).expand(3, -1, -1), self.read(map_path)
        if picture.shape[1:] != classes.shape:
            raise DataError(
                f"{printable(map_path)} is {classes.shape[1]} by {classes.shape[0]} pixels, and "
                f"its picture {picture.shape[2]} by {picture.shape[1]}; give maps of that size"
            )
        counted = classes[classes != IGNORED]
        if counted.numel() and int(counted.max()) >= self.num_classes:
            raise DataError(
                f"{printable(map_path)} has the class {int(counted.max())}, and there are "
                f"{self.num_classes}, counted from 0; {IGNORED} is what is not counted"
            )
        return Mapped(picture=picture, classes=classes)


def map_of_picture(path: Path) -> Int[Tensor, "h w"]:
    """The class of each pixel, from a picture whose values, or palette's numbers, are classes.

    Raises:
        DataError: If it cannot be read or has colours.
    """
    import numpy as np
    from PIL import Image  # only where there are pictures

    try:
        with Image.open(path) as picture:
            mode, values = picture.mode, np.array(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{printable(path)} cannot be read ({shortened(error)})") from error
    if mode not in {"L", "P"}:
        raise DataError(
            f"{printable(path)} has the mode {mode}; a map is a grey or palette picture whose "
            f"values are classes"
        )
    return torch.from_numpy(values).long()


def map_of_matlab(path: Path) -> Int[Tensor, "h w"]:
    """The class of each pixel, from a file of SBD's.

    Raises:
        DataError: If it cannot be read.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(path)["GTcls"][0]["Segmentation"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{printable(path)} cannot be read ({shortened(error)})") from error
    return torch.from_numpy(found.astype("int64"))


def _any_map(path: Path) -> Int[Tensor, "h w"]:
    return map_of_matlab(path) if path.suffix == ".mat" else map_of_picture(path)


@lru_cache(maxsize=1)
def read_voc(voc: Path, sbd: Path, side: int) -> Parts[Mapped]:
    """Pascal VOC 2012 with the maps of SBD: 10,582 training pictures, and 1,449 for the test.

    Trained on are the pictures of VOC's and both of SBD's lists that VOC does not test on; where
    both have a map, VOC's is taken. A twentieth is held out for validation.

    Args:
        voc: Folder of VOC 2012.
        sbd: Folder of SBD.
        side: Height and width of a training picture.

    Raises:
        DataError: If a folder or list is missing.
    """
    for folder, holds in ((voc, VOC_HOLDS), (sbd, SBD_HOLDS)):
        if not folder.is_dir():
            raise DataError(f"{printable(folder)} is not there; put {holds} there")
    lists = voc / "ImageSets" / "Segmentation"
    test, own = _names(lists / "val.txt"), _names(lists / "train.txt")
    more = [*_names(sbd / "train.txt"), *_names(sbd / "val.txt")]
    train = sorted({*own, *more} - {*test})
    of_voc = {*own}
    files = [_voc_files(voc, at) if at in of_voc else _sbd_files(sbd, at) for at in train]
    number = len(VOC_CLASSES)
    trained = MappedFiles(files, _any_map, number)
    rest, held = held_out(trained, VALIDATION_SHARE)
    judged = MappedFiles([_voc_files(voc, at) for at in test], _any_map, number)
    return Parts(
        name="voc",
        num_classes=number - 1,
        input_shape=(3, side, side),
        train=rest,
        validation=held,
        test=Part.of(judged),
        fingerprint=fingerprint_of_files(
            _listed_files({"train": trained, "test": judged}), *train, *test
        ),
        class_names=VOC_CLASSES,
    )


def _voc_files(voc: Path, name: str) -> tuple[Path, Path]:
    return voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationClass" / f"{name}.png"


def _sbd_files(sbd: Path, name: str) -> tuple[Path, Path]:
    return sbd / "img" / f"{name}.jpg", sbd / "cls" / f"{name}.mat"


def _names(path: Path) -> list[str]:
    require_file(path)
    return path.read_text(encoding="utf-8").split()


@lru_cache(maxsize=1)
def read_maps(folder: Path, side: int) -> Parts[Mapped]:
    """A user's pictures and maps: ``train/images/NAME.jpg`` beside ``train/maps/NAME.png``.

    ``val`` and ``test`` are folders like ``train``; without one of them a part of the training
    pictures is held out. ``classes.txt`` has the name of a class a line, the background first.

    Args:
        folder: Holds these.
        side: Height and width of a training picture.

    Raises:
        DataError: If one is missing, or a picture has no map.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)} is no folder; give one with train/images, train/maps")
    classes = _classes_of(folder)
    found: dict[str, MappedFiles] = {}
    for part, names in PART_NAMES.items():
        roots = [folder / name for name in names if (folder / name).is_dir()]
        if roots:
            found[part] = MappedFiles(_pairs(roots[0]), map_of_picture, len(classes))
    if "train" not in found:
        raise DataError(f"{printable(folder)} has no folder train; put train/images there")
    parts: dict[str, Part[Mapped]] = {name: Part.of(source) for name, source in found.items()}
    for part in ("test", "validation"):
        if part not in parts:
            parts["train"], parts[part] = _split(parts["train"])
    return Parts(
        name=printable(folder.name),
        num_classes=len(classes) - 1,
        input_shape=(3, side, side),
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        fingerprint=fingerprint_of_files(_listed_files(found), *classes),
        class_names=classes,
    )


def _classes_of(folder: Path) -> tuple[str, ...]:
    path = folder / CLASSES_FILE
    if not path.exists():
        raise DataError(
            f"{printable(folder)} has no {CLASSES_FILE}; write the name of a class a line there, "
            f"the background first, beside train/images and train/maps"
        )
    require_file(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    classes = tuple(line.strip() for line in lines if line.strip())
    if len(classes) < 2:
        raise DataError(
            f"{printable(path)} has {len(classes)} classes; give two or more, one a line, the "
            f"background first"
        )
    return classes


def _split(part: Part[Mapped]) -> tuple[Part[Mapped], Part[Mapped]]:
    rest, held = held_out(part, 0.1)
    return part.keep(rest.positions), part.keep(held.positions)


def _listed_files(found: Mapping[str, MappedFiles]) -> Iterator[tuple[str, Path]]:
    """Pictures and maps of each part."""
    for part, source in found.items():
        for pair in source.files:
            for path in pair:
                yield f"{part} {path.parent.name} {path.name}", path


def _pairs(root: Path) -> list[tuple[Path, Path]]:
    """Pictures and their maps."""
    pictures = sorted(
        path for path in (root / "images").glob("*") if path.suffix.lower() in SUFFIXES
    )
    if not pictures:
        raise DataError(f"{printable(root / 'images')} has no pictures; put some there")
    pairs = [(path, root / "maps" / f"{path.stem}.png") for path in pictures]
    missing = [own.name for _, own in pairs if not own.is_file()]
    if missing:
        raise DataError(
            f"{printable(root / 'maps')} has no {listed(missing)}; give a map for each picture"
        )
    return pairs
