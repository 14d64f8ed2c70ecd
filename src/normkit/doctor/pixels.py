"""The loss of each picture of a segmenter, which gives scores for every pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from normkit.errors import DataError
from normkit.tune.metrics import IGNORED, Metric

NOT_COUNTED = 255  # the class of pixels that maps leave out
OUTPUT = "out"  # where torchvision's segmenters have their scores


def loss_of_pictures(output: Any, batch: Any) -> Tensor:
    """The mean cross entropy of the pixels of each picture that are counted, ``(n,)``.

    Pixels of class -100 are not, nor those of class 255 where the model has fewer classes; a
    picture without others has the loss 0.

    Args:
        output: Scores ``(n, k, h, w)``, or a mapping that has them under ``out``.
        batch: Pictures, and their maps of classes ``(n, h, w)``.

    Raises:
        DataError: If scores and maps do not belong together.
    """
    scores = output.get(OUTPUT) if isinstance(output, Mapping) else output
    target = batch[1].long()
    if not isinstance(scores, Tensor) or scores.shape[:1] + scores.shape[2:] != target.shape:
        given = tuple(scores.shape) if isinstance(scores, Tensor) else type(output).__name__
        raise DataError(
            f"the model gave {given} for maps of classes of shape {tuple(target.shape)}; it "
            f"must give scores (N, classes, H, W), alone or as 'out'; else pass loss="
        )
    counted = target != IGNORED
    if scores.shape[1] <= NOT_COUNTED:
        counted &= target != NOT_COUNTED
    wrong = counted & ((target < 0) | (target >= scores.shape[1]))
    if wrong.any():
        raise DataError(
            f"a map has the class {int(target[wrong][0])}, and the model's output has "
            f"{scores.shape[1]} classes, 0 to {scores.shape[1] - 1}; correct the map, or give "
            f"pixels that are not counted the class {NOT_COUNTED}"
        )
    losses = functional.cross_entropy(
        scores.double(), target.where(counted, IGNORED), ignore_index=IGNORED, reduction="none"
    )
    return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


PIXELS_LOSS = Metric(name="the pixels' loss", score=loss_of_pictures, larger_is_better=False)


def are_of_segmenters(batches: Sequence[Any]) -> bool:
    """Whether batches are pictures and their maps of whole numbers ``(n, h, w)``."""
    first = batches[0] if batches else None
    if not isinstance(first, tuple | list) or len(first) < 2 or not isinstance(first[1], Tensor):
        return False
    return first[1].ndim == 3 and not first[1].is_floating_point()
