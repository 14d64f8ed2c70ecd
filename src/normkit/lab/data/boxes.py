"""Data sets with boxes of a user's own: what ``FILE.py:FUNCTION`` gives."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normkit.errors import DataError
from normkit.lab.data.annotated import Annotated, Part, Parts, Source, held_out
from normkit.lab.data.given import NAMES
from normkit.lab.data.streamed import as_tensor
from normkit.lab.user_code import load_function, users_errors

VALIDATION_SHARE = 0.1
NUM_FOR_FINGERPRINT = 64
TARGET = '{"boxes": (n, 4), "labels": (n,)} with corners x1, y1, x2, y2 and classes from 1'
RULE = (
    'it gives {"train": ..., "test": ..., "num_classes": ...}, maybe with "validation", whose data '
    f"sets give (picture, target) at a position, and a target is {TARGET}"
)


@lru_cache(maxsize=1)
def read_given_boxes(text: str, masks: bool = False, side: int | None = None) -> Parts[Annotated]:
    """Call a user's function, and take the data sets that it gives.

    Args:
        text: ``FILE.py:FUNCTION``.
        masks: Whether every object needs a mask.
        side: Shorter side of a picture as a detector gets it; by default the first picture's.

    Raises:
        NormError: If the function fails or gives something else.
    """
    make = load_function(text, "--data")
    with users_errors(text):
        given = make()
    known = isinstance(given, Mapping) and {*given} <= {*NAMES, "num_classes"}
    if not known or not {"train", "test", "num_classes"} <= {*given}:
        shown = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise DataError(f"{text} gave {shown}; {RULE}")
    number = given["num_classes"]
    parts: dict[str, Part[Annotated]] = {}
    for key, dataset in given.items():
        if key != "num_classes":
            name = f"{text.rpartition('/')[2]} ({key})"
            parts[NAMES[key]] = Part.of(_Given(dataset, name, number, masks))
            if not len(parts[NAMES[key]]):
                raise DataError(f"{name} has no examples; give one or more")
    if "validation" not in parts:
        parts["train"], parts["validation"] = held_out(parts["train"].source, VALIDATION_SHARE)
    first = parts["train"][0].picture
    height, width = (side, side) if side is not None else first.shape[1:]
    return Parts(
        name=text.rpartition("/")[2],
        num_classes=number,
        input_shape=(first.shape[0], height, width),
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        fingerprint=_fingerprint(parts),
        notes=_bare(parts),
    )


def _bare(parts: Mapping[str, Part[Annotated]]) -> tuple[str, ...]:
    """What to say of parts whose first pictures have no boxes.

    Raises:
        DataError: If these are all pictures of the training or the test part.
    """
    notes = []
    for name, part in parts.items():
        seen = min(len(part), NUM_FOR_FINGERPRINT)
        if any(len(part[at].boxes) for at in range(seen)):
            continue
        if seen == len(part) and name != "validation":
            raise DataError(
                f"none of the {seen} {name} pictures has a box, so there is nothing to find; each "
                f"target is {TARGET}"
            )
        notes.append(f"the first {seen} of {len(part)} {name} pictures have no boxes")
    return tuple(notes)


def _fingerprint(parts: Mapping[str, Part[Annotated]]) -> str:
    """Of the numbers of examples, and of some of them."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        digest.update(f"{name} {len(part)}".encode())
        for at in range(min(len(part), NUM_FOR_FINGERPRINT)):
            example = part[at]
            for value in (example.picture, example.boxes, example.labels):
                digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class _Given(Source[Annotated]):
    """A user's data set, of which each example is checked when it is taken."""

    dataset: Any
    name: str
    num_classes: int
    masks: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: int) -> Annotated:
        where = f"example {at} of {self.name}"
        with users_errors(where):
            example = self.dataset[at]
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise DataError(f"{where} is a {type(example).__name__}; {RULE}")
        picture, target = as_tensor(example[0], where), example[1]
        if not isinstance(target, Mapping) or not {"boxes", "labels"} <= {*target}:
            raise DataError(f"{where} has no boxes and labels; a target is {TARGET}")
        boxes = torch.as_tensor(target["boxes"]).float()
        if boxes.numel() and (boxes.ndim != 2 or boxes.shape[1] != 4):
            raise DataError(
                f"{where} has boxes of shape {tuple(boxes.shape)}; a target is {TARGET}"
            )
        boxes = boxes.reshape(-1, 4)
        labels = torch.as_tensor(target["labels"]).long().flatten()
        self._require_sound(boxes, labels, where)
        return Annotated(
            picture=picture,
            boxes=boxes,
            labels=labels,
            masks=self._masks(target, len(labels), picture, where) if self.masks else None,
        )

    def _require_sound(self, boxes: Tensor, labels: Tensor, where: str) -> None:
        if len(boxes) != len(labels):
            raise DataError(
                f"{where} has {len(boxes)} boxes and {len(labels)} labels; give as many"
            )
        if len(labels) and (int(labels.min()) < 1 or int(labels.max()) > self.num_classes):
            raise DataError(
                f"{where} has classes from {int(labels.min())} to {int(labels.max())}; they are "
                f"counted from 1 to num_classes, which is {self.num_classes}"
            )
        sound = (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1)
        if not bool(sound.all()):
            raise DataError(
                f"{where} has the box {boxes[~sound][0].tolist()}, of no width or height; give "
                f"corners x1, y1, x2, y2 in pixels, or leave it out"
            )
        if len(boxes) and float(boxes.max()) <= 1:
            raise DataError(
                f"{where} has no box beyond the first pixel, as {boxes[0].tolist()}; give corners "
                f"in pixels, not as shares of the picture"
            )

    def _masks(self, target: Mapping[str, Any], number: int, picture: Tensor, where: str) -> Tensor:
        if "masks" not in target:
            raise DataError(f'{where} has no "masks"; add them, or take --task detection')
        masks = torch.as_tensor(target["masks"]).bool()
        if tuple(masks.shape) != (number, *picture.shape[1:]):
            raise DataError(
                f"{where} has masks of shape {tuple(masks.shape)}; give one of the picture's size "
                f"for each box: {(number, *picture.shape[1:])}"
            )
        return masks
