"""Folders of pictures with annotations as COCO's: of one's own, or COCO itself."""

import importlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from normkit.errors import DataError
from normkit.lab.data.annotated import Annotated, Part, Parts, held_out
from normkit.lab.data.fingerprint import fingerprint_of_files
from normkit.lab.data.folder import decoded
from normkit.lab.files import require_file
from normkit.text import listed, printable, shortened

DEFAULT_SIDE = 800
VALIDATION_SHARE = 0.02  # of the training pictures, where a folder has no validation part
HOLDS = "a folder annotations with instances_train2017.json and instances_val2017.json, and the \
folders train2017 and val2017"
PARTS = ("train", "val", "test")


class Numbers(NamedTuple):
    """How many pictures and classes a data set has."""

    num_train: int
    num_validation: int
    num_test: int
    num_classes: int


COCO_NUMBERS = Numbers(114_920, 2_346, 5_000, 80)
"""COCO 2017: 117,266 training pictures have boxes, of which 2 percent are held out."""


@lru_cache(maxsize=1)
def read_coco(
    folder: Path, masks: bool = False, side: int | None = None, only_look: bool = False
) -> Parts[Annotated]:
    """Read ``annotations/instances_NAME.json`` and the pictures in the folder ``NAME``.

    ``NAME`` begins with ``train``, ``val`` or ``test``. A folder without ``test`` is tested on
    ``val``, and then a fiftieth of its training pictures is held out for validation. Training
    pictures without boxes are left out, as is usual, and boxes of no width or height.

    Args:
        folder: Holds ``annotations`` and the pictures.
        masks: Whether every object needs a mask.
        side: Shorter side of a picture as a detector gets it; 800 by default.
        only_look: Whether to stop when all files are found.

    Raises:
        DataError: If a file is missing or is not what COCO's format says.
    """
    files = _annotation_files(folder)
    if only_look:
        return None  # type: ignore[return-value]
    sources = {part: _read(path, masks) for part, path in files.items()}
    classes = sources["train"].classes
    for part, source in sources.items():
        if source.classes != classes:
            raise DataError(
                f"{printable(files[part])} has the classes {listed(source.classes.values())}, and "
                f"the training part {listed(classes.values())}; give both the same categories"
            )
    train = sources["train"].with_boxes()
    if {"val", "test"} <= sources.keys():
        parts = {name: Part.of(source) for name, source in sources.items()} | {"train": train}
    else:
        rest, held = held_out(train.source, VALIDATION_SHARE)
        judged = sources["test"] if "test" in sources else sources["val"]
        parts = {"train": rest, "val": held, "test": Part.of(judged)}
    size = side or DEFAULT_SIDE
    return Parts(
        name=printable(folder.name),
        num_classes=len(classes),
        input_shape=(3, size, size),
        train=parts["train"],
        validation=parts["val"],
        test=parts["test"],
        fingerprint=fingerprint_of_files(
            (f"{part} {path.parent.name} {path.name}", path)
            for part, source in sources.items()
            for path in (source.path, *source.files())
        ),
        notes=tuple(note for source in sources.values() for note in source.notes),
        class_names=tuple(classes.values()),
    )


def _annotation_files(folder: Path) -> dict[str, Path]:
    """The annotation file of each part, whose folder of pictures is there."""
    if not folder.is_dir():
        raise DataError(f"{printable(folder)} is not there; put {HOLDS} there")
    names = {path.stem.removeprefix("instances_"): path for path in _instances(folder)}
    files = {part: path for part in PARTS for name, path in names.items() if name.startswith(part)}
    if "train" not in files or len(files) == 1:
        raise DataError(
            f"{printable(folder / 'annotations')} has {listed(sorted(names)) or 'no annotations'}; "
            f"it needs instances_train.json, and instances_val.json or instances_test.json, each "
            f"with a folder of pictures of that name"
        )
    for path in files.values():
        pictures = _pictures_of(path)
        if not pictures.is_dir():
            raise DataError(
                f"{printable(path)} is there, but its pictures are not; put them into "
                f"{printable(pictures)}"
            )
    return files


def _instances(folder: Path) -> list[Path]:
    return sorted((folder / "annotations").glob("instances_*.json"))


def _pictures_of(annotations: Path) -> Path:
    return annotations.parent.parent / annotations.stem.removeprefix("instances_")


@dataclass(frozen=True, slots=True)
class CocoPictures:
    """Pictures of one annotation file.

    Args:
        path: The file.
        classes: Names of the classes by their number in the file.
        pictures: What the file says of each picture.
        objects: What it says of the objects of each.
        masks: Whether masks are given.
        notes: What is left out.
    """

    path: Path
    classes: Mapping[int, str]
    pictures: Sequence[Mapping[str, Any]]
    objects: Sequence[Sequence[Mapping[str, Any]]]
    masks: bool
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: int) -> Annotated:
        about, objects = self.pictures[at], self.objects[at]
        name = str(about["file_name"])
        picture = decoded(_pictures_of(self.path) / name).expand(3, -1, -1)
        size = (int(about["height"]), int(about["width"]))
        if tuple(picture.shape[1:]) != size:
            raise DataError(
                f"{printable(name)} is {picture.shape[2]} by {picture.shape[1]} pixels, and "
                f"{printable(self.path)} says {size[1]} by {size[0]}; correct one of them"
            )
        numbers = {number: at for at, number in enumerate(self.classes, 1)}
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return Annotated(
            picture=picture,
            boxes=boxes,
            labels=torch.tensor([numbers[each["category_id"]] for each in objects]).long(),
            masks=self._masks(objects, size, name) if self.masks else None,
            is_crowd=torch.tensor([bool(each.get("iscrowd", 0)) for each in objects]).bool(),
        )

    def files(self) -> list[Path]:
        """The pictures' files."""
        return [_pictures_of(self.path) / str(each["file_name"]) for each in self.pictures]

    def _masks(
        self, objects: Sequence[Mapping[str, Any]], size: tuple[int, int], name: str
    ) -> Bool[Tensor, "n h w"]:
        where = f"{printable(self.path)}, picture {printable(name)}"
        masks = [mask_of(each["segmentation"], size, where) for each in objects]
        return torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)

    def with_boxes(self) -> Part[Annotated]:
        """The pictures that have a box that counts."""
        kept = [
            at
            for at, objects in enumerate(self.objects)
            if any(not each.get("iscrowd", 0) for each in objects)
        ]
        if not kept:
            raise DataError(f"no picture of {printable(self.path)} has a box; give one or more")
        chosen = CocoPictures(
            self.path,
            self.classes,
            [self.pictures[at] for at in kept],
            [self.objects[at] for at in kept],
            self.masks,
        )
        return Part.of(chosen)


def mask_of(segmentation: Any, size: tuple[int, int], where: str) -> Bool[Tensor, "h w"]:
    """The pixels of a mask: of polygons, or of a run-length encoding.

    Args:
        segmentation: What the file says.
        size: Height and width of the picture.
        where: What messages call it.

    Raises:
        DataError: If it is of another size, or of another form.
    """
    coco_masks: Any = importlib.import_module("pycocotools.mask")
    if isinstance(segmentation, Mapping) and tuple(segmentation.get("size", ())) != size:
        given = " by ".join(map(str, reversed(list(segmentation.get("size", ())))))
        raise DataError(
            f"{where} has a mask of {given or 'no'} pixels, and the picture is {size[1]} by "
            f"{size[0]}; give masks of the picture's size"
        )
    if not isinstance(segmentation, Mapping) and not all(map(_is_polygon, segmentation)):
        raise DataError(
            f"{where} has the mask {printable(segmentation, 60)}; give polygons "
            f"[[x, y, x, y, x, y, ...]] or a run-length encoding"
        )
    runs = segmentation
    if not isinstance(segmentation, Mapping) or isinstance(segmentation.get("counts"), list):
        runs = coco_masks.frPyObjects(segmentation, *size)
    with warnings.catch_warnings():  # pycocotools 2.0.11 beside numpy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        found = coco_masks.decode(runs if isinstance(runs, list) else [runs])
    return torch.from_numpy(found).any(-1)


def _is_polygon(given: Any) -> bool:
    """Whether something is the corners of a polygon, three or more."""
    is_list = isinstance(given, list) and len(given) >= 6 and len(given) % 2 == 0
    return is_list and all(isinstance(value, int | float) for value in given)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(path: Path, masks: bool) -> CocoPictures:
    require_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pictures = {each["id"]: each for each in content["images"]}
        _require_sizes(content["images"], path)
        classes = {each["id"]: str(each["name"]) for each in content["categories"]}
        annotations = content["annotations"]
        objects: dict[Any, list[Mapping[str, Any]]] = {at: [] for at in pictures}
        empty = 0
        for each in annotations:
            _require_sound(each, pictures, classes, path, masks)
            if min(each["bbox"][2:]) > 0:
                objects[each["image_id"]].append(each)
            else:
                empty += 1
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{printable(path)} is no annotation file as COCO's ({type(error).__name__}: "
            f"{shortened(error)}); it has images, categories and annotations"
        ) from error
    notes = [f"{empty} boxes of {path.stem} have no width or height and are left out"]
    bare = sum(not found for found in objects.values())
    if bare == len(objects):
        raise DataError(f"no picture of {printable(path)} has a box; give one or more")
    said = f"{bare} pictures of {path.stem} have no boxes; they are tested on, and not trained on"
    far = sum(_reaches_out(each, pictures[at]) for at, found in objects.items() for each in found)
    reach = (
        f"{far} boxes of {path.stem} reach out of their pictures; a box is [x, y, width, height]"
    )
    return CocoPictures(
        path,
        classes,
        list(pictures.values()),
        list(objects.values()),
        masks,
        (*(notes if empty else ()), *((said,) if bare else ()), *((reach,) if far else ())),
    )


def _require_sizes(pictures: Sequence[Mapping[str, Any]], path: Path) -> None:
    for each in pictures:
        missing = [key for key in ("file_name", "height", "width") if key not in each]
        if missing:
            raise DataError(
                f"picture {each['id']} of {printable(path)} has no {listed(missing)}; "
                f"give file_name, height and width of each picture"
            )


def _reaches_out(each: Mapping[str, Any], picture: Mapping[str, Any]) -> bool:
    """Whether a box lies outside its picture by more than the pixel of a rounded corner."""
    x, y, width, height = each["bbox"]
    right, bottom = x + width - picture["width"], y + height - picture["height"]
    return max(-x, -y, right, bottom) > 1


def _require_sound(
    each: Mapping[str, Any],
    pictures: Mapping[Any, Any],
    classes: Mapping[int, str],
    path: Path,
    masks: bool,
) -> None:
    where = f"annotation {each.get('id', '?')} of {printable(path)}"
    if each["category_id"] not in classes:
        raise DataError(
            f"{where} has the class {each['category_id']}, and the categories are "
            f"{listed(sorted(classes))}; correct it, or add the category"
        )
    if each["image_id"] not in pictures:
        raise DataError(f"{where} is of picture {each['image_id']}, which images does not have")
    if len(each["bbox"]) != 4 or not all(map(_is_finite, each["bbox"])):
        raise DataError(f"{where} has the box {each['bbox']}; give [x, y, width, height]")
    if masks and not each.get("segmentation"):
        raise DataError(f"{where} has no mask; give a segmentation, or take --task detection")
