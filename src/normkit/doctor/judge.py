"""Score states of a model by the loss of each held-out example, so that states can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.inference.tracked import statistics_of
from normkit.passes import Data, Forward, untouched
from normkit.tune.gain import Gain, paired_gain
from normkit.tune.metrics import KNOWN, Metric

NOT_FINITE = 100.0  # the least that a loss counts that is not finite

Halves = tuple[Sequence[Any], Sequence[Any]]
Values = Mapping[str, Mapping[str, Tensor]]
"""Running statistics: for each layer's name, its buffers by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The losses of examples, and which examples were classified rightly.

    Args:
        loss: Losses ``(n,)``. A loss that is not finite is replaced by 100, or by the largest
            finite loss if that is larger.
        right: 1 where the class was right and 0 elsewhere, ``(n,)``; None if the loss is not the
            cross entropy.
        num_broken: How many losses were not finite.
    """

    loss: Tensor
    right: Tensor | None
    num_broken: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean loss over the examples."""
        return self.loss.mean().item()

    @property
    def accuracy(self) -> float | None:
        """Share of examples that were classified rightly."""
        return None if self.right is None else self.right.mean().item()

    def then(self, other: Scores) -> Scores:
        """Append the scores of other examples."""
        right = [each for each in (self.right, other.right) if each is not None]
        return Scores(
            loss=torch.cat([self.loss, other.loss]),
            right=torch.cat(right) if len(right) == 2 else None,
            num_broken=self.num_broken + other.num_broken,
        )

    def gain_over(self, before: Scores) -> Gain:
        """How much smaller each example's loss is than in ``before``, for the same examples."""
        return paired_gain(before.loss - self.loss, binary=False)


class Judge:
    """Scores all states of a model on the same examples.

    Args:
        halves: Held-out batches in two halves; one half judges what was measured on the other.
        metric: Gives one value for each example; smaller is better.
        forward: ``forward(model, batch)`` gives what the metric scores.
        is_single: Whether it sends each example alone.
    """

    def __init__(
        self, halves: Halves, metric: Metric, forward: Forward, *, is_single: bool = False
    ) -> None:
        self.halves, self.metric, self.forward, self.is_single = halves, metric, forward, is_single

    def scores(self, model: nn.Module, what: str, half: int | None = None) -> Scores:
        """Score a model with its present modes and buffers, which the caller has set.

        Args:
            model: The model.
            what: Text of the progress line.
            half: The half that judges, 0 or 1; None for both, the first half first.

        Raises:
            DataError: If the loss does not give one value for each example.
        """
        losses, right = list[Tensor](), list[Tensor]()

        def send(model: nn.Module, batch: Any) -> None:
            output = self.forward(model, batch)
            losses.append(self.metric.of(output, batch).cpu())
            if self.metric is KNOWN["loss"]:
                right.append(KNOWN["accuracy"].of(output, batch).cpu())

        batches = [*self.halves[0], *self.halves[1]] if half is None else self.halves[half]
        Data(batches=batches, forward=send).send(model, what)
        found = torch.cat(losses)
        finite = found[found.isfinite()]
        worst = max(NOT_FINITE, finite.max().item()) if finite.numel() else NOT_FINITE
        return Scores(
            loss=torch.where(found.isfinite(), found, worst),
            right=torch.cat(right) if right else None,
            num_broken=len(found) - finite.numel(),
        )


def at_evaluation(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block with the model in evaluation mode, then restore its modes and buffers."""
    return untouched(model, training=False)


@contextmanager
def temporary_statistics(model: nn.Module, values: Values):  # noqa: ANN201 - a context manager
    """Run a block in evaluation mode with other running statistics in some layers."""
    with at_evaluation(model):
        write(model, values)
        yield


@torch.no_grad()
def write(model: nn.Module, values: Values) -> None:
    """Copy running statistics into the layers' buffers."""
    for name, buffers in values.items():
        for key, buffer in statistics_of(model.get_submodule(name)).items():
            if key in buffers:
                buffer.copy_(buffers[key])
