"""Metrics: functions that give one score for each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from normkit.errors import DataError, OptionError

IGNORED = -100  # the target that torch's cross entropy ignores
Score = Callable[[Any, Any], Tensor]
"""``score(output, batch)`` gives one value for each example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A score of every example, and whether larger scores are better.

    Args:
        name: Name in reports and messages.
        score: ``score(output, batch)`` gives one value for each example.
        larger_is_better: Whether larger scores are better.
        binary: Whether all scores are 0 or 1, so that the metric has no gradient.
    """

    name: str
    score: Score
    larger_is_better: bool
    binary: bool = False

    def of(self, output: Any, batch: Any) -> Tensor:
        """Score a batch, ``(n,)`` in float64.

        Raises:
            DataError: If the metric does not return one value for each example.
        """
        scores = self.score(output, batch)
        if not isinstance(scores, Tensor) or scores.ndim != 1:
            given = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
            raise DataError(
                f"the metric {self.name} gave {given} for a batch; it must give one value for each "
                f"example, shape (n,), so that examples can be compared: use reduction='none', not "
                f"the mean"
            )
        return scores.double()

    def gains(self, scores: Tensor, before: Tensor) -> Tensor:
        """The gain of each example over its score ``before``; above 0 is better."""
        return scores - before if self.larger_is_better else before - scores


def read_metric(metric: Literal["loss", "accuracy"] | Score, larger_is_better: bool) -> Metric:
    """Read ``metric=``.

    Raises:
        OptionError: If it is neither a known name nor callable.
    """
    if isinstance(metric, str) and metric in KNOWN:
        return KNOWN[metric]
    if isinstance(metric, str) or not callable(metric):
        raise OptionError(
            f"metric={metric!r} was given; it is one of {', '.join(map(repr, KNOWN))} or a "
            f"callable metric(output, batch) that gives one value for each example"
        )
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name=name, score=metric, larger_is_better=larger_is_better)


def _loss(output: Any, batch: Any) -> Tensor:
    scores, target = scores_and_targets(output, batch)
    return functional.cross_entropy(scores.double(), target, reduction="none")


def _accuracy(output: Any, batch: Any) -> Tensor:
    scores, target = scores_and_targets(output, batch)
    return (scores.argmax(1) == target).double()


KNOWN = {
    "loss": Metric(name="loss", score=_loss, larger_is_better=False),
    "accuracy": Metric(name="accuracy", score=_accuracy, larger_is_better=True, binary=True),
}


def scores_and_targets(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Read the class scores ``(N, K)`` and the targets ``(N,)`` from an output and its batch.

    Raises:
        DataError: If the output or the batch has another form.
    """
    way_out = "pass a function (output, batch) that gives one value for each example instead"
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        pair = isinstance(batch, tuple | list) and len(batch) > 1
        given = f"a target of type {type(batch[1] if pair else batch).__name__}"
        if not pair:
            given = f"a batch of type {type(batch).__name__}"
        raise DataError(
            f"{given} was given; loss and accuracy take pairs (inputs, target) with a tensor of "
            f"classes as target; {way_out}"
        )
    target = batch[1]
    fits = isinstance(output, Tensor) and output.ndim == 2 and target.shape == output.shape[:1]
    if not fits or target.is_floating_point():
        raise DataError(
            f"the output is {_shown(output)} and the target {_shown(target)}; loss and accuracy "
            f"take scores (N, K) and whole numbers (N,); {way_out}"
        )
    _require_classes(target, output.shape[1])
    return output, target.long()


def _require_classes(target: Tensor, num_classes: int) -> None:
    wrong = (target != IGNORED) & ((target < 0) | (target >= num_classes))
    if wrong.any():
        raise DataError(
            f"target {int(target[wrong][0])} was given, and the model's output has {num_classes} "
            f"classes, 0 to {num_classes - 1}; check the data, or the size of the output"
        )


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
