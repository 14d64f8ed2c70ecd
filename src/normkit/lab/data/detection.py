"""Data of detection: scenes, folders as COCO's, and data sets of a user's function."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from normkit.errors import DataError, SpecError
from normkit.lab.data.annotated import Annotated, Drawn, Part, Parts
from normkit.lab.data.boxes import read_given_boxes
from normkit.lab.data.coco import COCO_NUMBERS, read_coco
from normkit.lab.data.folder import PREFIX
from normkit.lab.data.known import Sample
from normkit.lab.data.scenes import SCENES, scenes
from normkit.lab.data.sources import FOLDER_VARIABLE, data_folder
from normkit.lab.user_code import is_reference
from normkit.text import printable

if TYPE_CHECKING:
    from normkit.lab.spec import Protocol

COCO = "coco"


def open_annotated(protocol: Protocol, masks: bool) -> Parts[Annotated]:
    """Open what a protocol names.

    Args:
        protocol: Names the data, how many of them, and whether any are held out.
        masks: Whether masks are needed.

    Raises:
        NormError: If it is unknown or cannot be read.
    """
    found = _opened(protocol, masks).limited(protocol.limit)
    return found if protocol.hold_out else found.with_validation_in_training()


def _opened(protocol: Protocol, masks: bool) -> Parts[Annotated]:
    text, side = protocol.data, protocol.image_size
    if text.partition(":")[0] == SCENES:
        return scenes(text)
    if text.startswith(PREFIX):
        return read_coco(Path(text.removeprefix(PREFIX)).expanduser(), masks, side)
    if text == COCO:
        return read_coco(data_folder() / COCO, masks, side)
    if is_reference(text):
        return read_given_boxes(text, masks, side)
    raise SpecError(
        f"there is no data {printable(text)!r} with boxes; write scenes, coco, folder:PATH with "
        f"annotations as COCO's, or FILE.py:FUNCTION"
    )


def random_annotated(protocol: Protocol, masks: bool) -> Sample:
    """As many random pictures as COCO has, of the size that a detector gets, with random boxes."""
    side = protocol.image_size or 800
    numbers = COCO_NUMBERS
    width = round(side * 4 / 3)
    drawn = partial(_random, (3, side, width), masks)

    def part(number: int) -> Part[Annotated]:
        return Part.of(Drawn(drawn, number))

    data = Parts(
        name=COCO,
        num_classes=numbers.num_classes,
        input_shape=(3, side, side),
        train=part(min(protocol.limit or numbers.num_train, numbers.num_train)),
        validation=part(numbers.num_validation),
        test=part(numbers.num_test),
    )
    try:
        read_coco(data_folder() / COCO, masks, side, only_look=True)
    except DataError as error:
        return Sample(data, f"{error} ({FOLDER_VARIABLE} says where)")
    return Sample(data)


def _random(shape: tuple[int, int, int], masks: bool, at: int) -> Annotated:
    """Seven boxes, as many as a picture of COCO has in the mean."""
    generator = torch.Generator().manual_seed(at)
    _, height, width = shape
    sides = torch.tensor([width, height, width, height]) - 1.0
    corners = torch.rand(7, 2, 2, generator=generator).sort(1).values.flatten(1)
    boxes = (corners * sides).floor() + torch.tensor([0.0, 0.0, 1.0, 1.0])
    found = torch.zeros(7, height, width, dtype=torch.bool) if masks else None
    for box, mask in zip(boxes.long().tolist(), () if found is None else found, strict=False):
        mask[box[1] : box[3], box[0] : box[2]] = True
    return Annotated(
        picture=torch.rand(shape, generator=generator),
        boxes=boxes,
        labels=torch.randint(1, 81, (7,), generator=generator),
        masks=found,
    )
