"""Data of video recognition: clips that are drawn, and folders of frames."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from normkit.errors import DataError, SpecError
from normkit.lab.data.annotated import Part, Parts, Source, held_out
from normkit.lab.data.clips import Clip, clips
from normkit.lab.data.dataset import SPLIT_SEED, stratified_order
from normkit.lab.data.fingerprint import fingerprint_of_files
from normkit.lab.data.folder import PARTS as PART_NAMES
from normkit.lab.data.folder import PREFIX, SUFFIXES, class_names, decoded
from normkit.lab.data.sources import data_folder
from normkit.lab.data.views import at_size
from normkit.lab.files import require_file
from normkit.text import listed, printable

if TYPE_CHECKING:
    from normkit.lab.spec import Protocol

SIDE = 224
VALIDATION_SHARE = 0.05
SOMETHING = "something-something-v1"
SOMETHING_NUMBERS = (81_716, 4_301, 11_522)  # training clips without those held out; the test
SOMETHING_CLASSES = 174
HOLDS = (
    f"the folder 20bn-{SOMETHING} with a folder of frames for each clip, and {SOMETHING}-"
    f"labels.csv, {SOMETHING}-train.csv and {SOMETHING}-validation.csv"
)


@dataclass(frozen=True, slots=True)
class FrameFolders:
    """Clips that are folders of pictures.

    Args:
        folders: A folder for each clip, whose frames are in the order of their names.
        labels: Class of each clip, from 0.
        side: Height and width of a frame.
    """

    folders: Sequence[Path]
    labels: Sequence[int]
    side: int

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, at: int) -> ClipFiles:
        frames = sorted(
            path for path in self.folders[at].glob("*") if path.suffix.lower() in SUFFIXES
        )
        if not frames:
            raise DataError(
                f"the clip {printable(self.folders[at])} has no frames; put pictures there, or "
                f"take the folder away"
            )
        return ClipFiles(frames, self.labels[at], self.side)


@dataclass(frozen=True, slots=True)
class ClipFiles:
    """The frames of a clip, which are read when they are taken."""

    frames: Sequence[Path]
    label: int
    side: int

    def __len__(self) -> int:
        return len(self.frames)

    def taken(self, index: Int[Tensor, " t"]) -> Shaped[Tensor, "t c h w"]:
        """The frames at these positions."""
        size = (self.side, self.side)
        read = [decoded(self.frames[at]).expand(3, -1, -1) for at in index.tolist()]
        return torch.stack([at_size(frame, size) for frame in read])


def frames_of(clip: Clip | ClipFiles, index: Int[Tensor, " t"]) -> Shaped[Tensor, "t c h w"]:
    """The frames of a clip at these positions."""
    return clip.frames[index] if isinstance(clip, Clip) else clip.taken(index)


def num_frames_of(clip: Clip | ClipFiles) -> int:
    """How many frames a clip has."""
    return len(clip.frames)


def segments(num_frames: int, number: int, chances: Tensor | None = None) -> Int[Tensor, " t"]:
    """Positions of frames, one from each of so many equal segments of a clip.

    Args:
        num_frames: Frames of the clip; if there are fewer than segments, some are taken twice.
        number: Segments.
        chances: Where in its segment each frame lies, in [0, 1); the middle by default.

    Source:
        Wang et al. 2016, Temporal Segment Networks, arXiv:1608.00859, section 3.1.
    """
    within = torch.full((number,), 0.5) if chances is None else chances
    at = (torch.arange(number) + within) * num_frames / number
    return at.long().clamp(max=num_frames - 1)


def open_clips(protocol: Protocol) -> Parts[Clip | ClipFiles]:
    """Open what a protocol names.

    Args:
        protocol: Names the data, how many of them, and whether any are held out.

    Raises:
        NormError: If it is unknown or cannot be read.
    """
    text, side = protocol.data, protocol.image_size or SIDE
    if text.partition(":")[0] == "clips":
        found: Parts[Clip | ClipFiles] = clips(text)  # type: ignore[assignment]
    elif text.startswith(PREFIX):
        found = read_clips(Path(text.removeprefix(PREFIX)).expanduser(), side)
    elif text == SOMETHING:
        found = read_something(data_folder() / SOMETHING, side)
    else:
        raise SpecError(
            f"there is no data {printable(text)!r} with clips; write clips, {SOMETHING}, or "
            f"folder:PATH with train/CLASS/CLIP/FRAME.jpg"
        )
    found = found.limited(protocol.limit)
    return found if protocol.hold_out else found.with_validation_in_training()


@lru_cache(maxsize=1)
def read_clips(folder: Path, side: int) -> Parts[Clip | ClipFiles]:
    """A user's clips: ``train/CLASS/CLIP/FRAME.jpg``; ``val`` and ``test`` are like ``train``.

    Without ``val`` or ``test``, a twentieth of the training clips is held out for each.

    Args:
        folder: Holds these.
        side: Height and width of a frame.

    Raises:
        DataError: If there is no ``train``, fewer than two classes, or a class without clips.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)} is no folder; give one with train/CLASS/CLIP/FRAME")
    roots = {
        part: folder / name
        for part, names in PART_NAMES.items()
        for name in names
        if (folder / name).is_dir()
    }
    if "train" not in roots:
        raise DataError(f"{printable(folder)} has no folder train; put train/CLASS/CLIP there")
    classes = class_names(roots)
    found = {part: _of_classes(root, classes, side) for part, root in roots.items()}
    parts: dict[str, Part[Clip | ClipFiles]] = {n: Part.of(own) for n, own in found.items()}
    for part in ("test", "validation"):
        if part not in parts:
            rest, held = held_out(parts["train"], VALIDATION_SHARE)
            parts |= {
                part: parts["train"].keep(held.positions),
                "train": parts["train"].keep(rest.positions),
            }
    for part in ("train", "validation"):  # a limit keeps the first ones, and they come by class
        folders = found[part if part in found else "train"]
        labels = torch.tensor(folders.labels)[parts[part].positions]
        parts[part] = parts[part].keep(stratified_order(labels, SPLIT_SEED))
    return Parts(
        name=printable(folder.name),
        num_classes=len(classes),
        input_shape=(3, side, side),
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        fingerprint=fingerprint_of_files(
            (f"{part} {source.labels[at]} {path.parent.name} {path.name}", path)
            for part, source in found.items()
            for at in range(len(source))
            for path in source[at].frames
        ),
        class_names=tuple(classes),
    )


def _of_classes(root: Path, classes: Sequence[str], side: int) -> FrameFolders:
    folders: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(path for path in (root / name).iterdir() if path.is_dir())
        if not own:
            raise DataError(
                f"{printable(root / name)} has no folders; give one for each clip, with its frames"
            )
        folders += own
        labels += [label] * len(own)
    source = FrameFolders(folders, labels, side)
    for at in range(len(source)):
        source[at]
    return source


@lru_cache(maxsize=1)
def read_something(folder: Path, side: int) -> Parts[Clip | ClipFiles]:
    """Something-Something V1, tested on its validation clips.

    Its fingerprint is that of the lists: the four million frames are not looked at.

    Args:
        folder: Holds the folder of clips and three lists.
        side: Height and width of a frame.

    Raises:
        DataError: If one is missing, or a list names an unknown class.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)} is not there; put {HOLDS} there")
    lists = {part: folder / f"{SOMETHING}-{part}.csv" for part in ("labels", "train", "validation")}
    classes = [row[0] for row in _rows(lists["labels"])]
    parts: dict[str, FrameFolders] = {}
    for part in ("train", "validation"):
        path = lists[part]
        rows = _rows(path)
        unknown = sorted({label for _, label in rows} - {*classes})
        if unknown:
            raise DataError(
                f"{printable(path)} names the class {listed(unknown)}, which the list of labels "
                f"does not; correct one of them"
            )
        clips_folder = folder / f"20bn-{SOMETHING}"
        parts[part] = FrameFolders(
            [clips_folder / name for name, _ in rows],
            [classes.index(label) for _, label in rows],
            side,
        )
    sources: dict[str, Source[Clip | ClipFiles]] = {**parts}
    rest, held = held_out(sources["train"], VALIDATION_SHARE)
    return Parts(
        name=SOMETHING,
        num_classes=len(classes),
        input_shape=(3, side, side),
        train=rest,
        validation=held,
        test=Part.of(sources["validation"]),
        fingerprint=fingerprint_of_files((path.name, path) for path in lists.values()),
        class_names=tuple(classes),
    )


def _rows(path: Path) -> list[list[str]]:
    require_file(path)
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file, delimiter=";") if row]
