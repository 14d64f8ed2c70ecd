"""Pictures in folders, with one folder for each class, as in ImageNet."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from normkit.errors import DataError
from normkit.lab.data.dataset import Dataset, Pictures, Split, assembled
from normkit.lab.data.streamed import Streamed, as_tensor
from normkit.lab.environment import memory_bytes
from normkit.text import listed, printable, shortened

PREFIX = "folder:"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
DECODED_AT_ONCE = 50_000  # if there are more pictures, each is decoded only when it is needed
DEFAULT_SIDE = 224  # used if pictures have different sizes
SHARE_OF_MEMORY = 4  # pictures are kept in up to a quarter of the memory


class File(NamedTuple):
    """A picture's file, and its class."""

    path: Path
    label: int


def read_folder(folder: Path, limit: int | None = None, side: int | None = None) -> Dataset[Split]:
    """Read class folders, with or without ``train``, ``val`` and ``test`` folders above them.

    If there is no test folder, a fifth of each class is held out; if there is no validation folder,
    a tenth of the training pictures. They are the same ones each time. Pictures that cannot be read
    are left out and named in the data set's notes.

    Args:
        folder: Folder with a folder for each class, or with ``train`` and possibly ``val`` and
            ``test``, which have these.
        limit: Number of training examples to keep, ``None`` for all.
        side: Height and width of the network's inputs; by default the size of the pictures if all
            have the same, else 224.

    Raises:
        DataError: If there are no pictures or fewer than two classes, a class is missing in one
            part, or no picture can be read.
    """
    roots = training_folders(folder)
    classes = class_names(roots)
    return read_files(
        folder, {part: files_of(root, classes) for part, root in roots.items()}, limit, side
    )


def training_folders(folder: Path) -> dict[str, Path]:
    """The folders ``train``, ``val`` and ``test`` of a folder; itself to train on without them.

    Raises:
        DataError: If it is no folder, or has parts and no ``train``.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)} is not a folder; give one with a folder per class")
    roots = part_folders(folder) or {"train": folder}
    if "train" not in roots:
        raise DataError(
            f"{printable(folder)} has {listed(r.name for r in roots.values())} and no folder "
            f"train; put the training pictures there"
        )
    return roots


def read_files(
    folder: Path,
    files: Mapping[str, list[File]],
    limit: int | None = None,
    side: int | None = None,
) -> Dataset[Split]:
    """Read pictures whose split is known.

    Args:
        folder: Folder that contains all files.
        files: Files of ``train`` and possibly ``validation`` and ``test``.
        limit: As in :func:`read_folder`.
        side: As in :func:`read_folder`.

    Raises:
        DataError: If no picture of a class can be read.
    """
    reading = _Reading(folder)
    parts = {name: reading.part(of_part) for name, of_part in files.items()}
    return _dataset(reading, reading.same_channels(parts), limit, side)


def part_folders(folder: Path) -> dict[str, Path]:
    """Find the folders of ``train``, ``validation`` and ``test`` in a folder."""
    found = {part: _part(folder, names) for part, names in PARTS.items()}
    return {part: root for part, root in found.items() if root is not None}


def _part(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder of a part, in upper or lower case; None if there is none."""
    return next(
        (p for p in sorted(folder.iterdir()) if p.name.lower() in names and p.is_dir()), None
    )


def class_names(roots: Mapping[str, Path]) -> list[str]:
    """Names of the class folders, which are the same in all parts.

    Raises:
        DataError: If the names differ between parts, or there are fewer than two classes.
    """
    named = {part: class_folders(root) for part, root in roots.items()}
    classes, place = named["train"], printable(roots["train"])
    if len(classes) < 2:
        raise DataError(
            f"{place} has {listed(classes) or 'no folder'}; it needs a folder of pictures for "
            f"each class, two or more"
        )
    for part, names in named.items():
        differing = sorted(set(names) ^ set(classes))
        if differing:
            raise DataError(
                f"the classes of {place} and {printable(roots[part])} differ: {listed(differing)} "
                f"{'is' if len(differing) == 1 else 'are'} in only one of them; give both the same"
            )
    return classes


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones left out."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def files_of(root: Path, classes: Sequence[str]) -> list[File]:
    """Find the pictures in the class folders of a part.

    Raises:
        DataError: If a class has no pictures.
    """
    files = [
        File(path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not files:
        raise DataError(
            f"{printable(root)} has no pictures in its class folders; known are files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    empty = [name for label, name in enumerate(classes) if label not in {f.label for f in files}]
    if empty:
        raise DataError(
            f"{printable(root)} has no pictures in {listed(empty)}; take the folder away, or put "
            f"pictures there"
        )
    return files


class _Part(NamedTuple):
    """The readable pictures of a part, in memory if there is room."""

    files: list[File]
    values: list[Shaped[Tensor, "c h w"]] | None
    shapes: set[tuple[int, ...]]


@dataclass(slots=True)
class _Reading:
    """State of reading a folder's files: hash, unreadable files, and memory that is left."""

    folder: Path
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    broken: list[Path] = field(default_factory=list)
    room: int = field(default_factory=lambda: memory_bytes() // SHARE_OF_MEMORY)

    def part(self, files: list[File]) -> _Part:
        """Read the pictures of a part; only their headers if there are very many."""
        whole = len(files) <= DECODED_AT_ONCE
        kept, values, shapes = list[File](), list[Tensor](), set[tuple[int, ...]]()
        for file in files:
            try:
                content = file.path.read_bytes() if whole else None
                picture = decoded(file.path, content) if whole else None
                shape = _header_shape(file.path) if picture is None else tuple(picture.shape)
            except DataError:
                self.broken.append(file.path)
                continue
            name = file.path.relative_to(self.folder)
            self.digest.update(f"{name} {file.label} {file.path.stat().st_size}".encode())
            self.digest.update(content or b"")
            kept.append(file)
            shapes.add(shape)
            if picture is not None and self.room > 0:
                values.append(picture)
                self.room -= picture.numel()
        if not kept:
            raise DataError(
                f"none of the {len(files)} pictures in {printable(self.folder)} can be read, "
                f"such as {printable(files[0].path.name)}; give pictures that PIL opens"
            )
        known = {file.label for file in kept}
        empty = {file.path.parent.name for file in files if file.label not in known}
        if empty:
            raise DataError(
                f"no picture of {listed(sorted(empty))} can be read; give pictures that PIL opens, "
                f"or take the folder away"
            )
        return _Part(kept, values if len(values) == len(kept) else None, shapes)

    def same_channels(self, parts: Mapping[str, _Part]) -> dict[str, _Part]:
        """Give grey pictures three channels if other pictures have colours."""
        if len({shape[0] for part in parts.values() for shape in part.shapes}) == 1:
            return dict(parts)

        def coloured(part: _Part) -> _Part:
            values = part.values and [v.expand(3, -1, -1) for v in part.values]
            return _Part(part.files, values, {(3, *shape[1:]) for shape in part.shapes})

        return {name: coloured(part) for name, part in parts.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """A note about the pictures that are left out."""
        if not self.broken:
            return ()
        names = listed(path.relative_to(self.folder) for path in self.broken)
        number = len(self.broken)
        said = (
            "1 picture cannot be read and is"
            if number == 1
            else f"{number} pictures cannot be read and are"
        )
        return (f"{said} left out: {names}",)


def decoded(path: Path, content: bytes | None = None) -> Shaped[Tensor, "c h w"]:
    """Decode the picture in a file.

    Raises:
        DataError: If it cannot be read.
    """
    from PIL import Image  # an optional package, needed only for picture files

    try:
        source = path.read_bytes() if content is None else content
        with Image.open(io.BytesIO(source)) as picture:
            return as_tensor(picture, str(path))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"the picture {printable(path)} cannot be read ({shortened(error)}); move it away"
        ) from error


def _header_shape(path: Path) -> tuple[int, ...]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            width, height = picture.size
            return (1 if picture.mode.startswith(("1", "L", "I")) else 3, height, width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture {printable(path)} cannot be read") from error


def _dataset(
    reading: _Reading,
    parts: Mapping[str, _Part],
    limit: int | None,
    side: int | None,
) -> Dataset[Split]:
    shapes = {shape for part in parts.values() for shape in part.shapes}
    own = next(iter(shapes))[1:] if len(shapes) == 1 else (DEFAULT_SIDE, DEFAULT_SIDE)
    height, width = own if side is None else (side, side)
    shape = (next(iter(shapes))[0], height, width)
    return assembled(
        printable(reading.folder.name),
        {name: _split(part, shape) for name, part in parts.items()},
        reading.digest.hexdigest()[:12],
        limit,
        reading.notes,
    )


def _split(part: _Part, shape: tuple[int, int, int]) -> Pictures | Streamed:
    """A split in memory if it has room and the right size, else one that reads when needed."""
    targets = torch.tensor([file.label for file in part.files])
    if part.values is not None and part.shapes == {shape}:
        return Pictures(values=torch.stack(part.values), targets=targets)
    return Streamed(
        read=_FromFiles([file.path for file in part.files], shape[0]),
        positions=torch.arange(len(targets)),
        targets=targets,
        input_shape=shape,
    )


@dataclass(frozen=True, slots=True)
class _FromFiles:
    paths: list[Path]
    num_channels: int

    def __call__(self, at: int) -> Shaped[Tensor, "c h w"]:
        return decoded(self.paths[at]).expand(self.num_channels, -1, -1)
