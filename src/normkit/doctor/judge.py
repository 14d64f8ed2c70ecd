"""The judge: losses of a model on held-out examples, one by one, so that states of it compare."""

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

NOT_FINITE = 100.0  # what a loss that is not finite counts as at least

Halves = tuple[Sequence[Any], Sequence[Any]]
Values = Mapping[str, Mapping[str, Tensor]]
"""Buffers by layer and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Losses of examples ``(n,)`` and, where there are classes, which were right.

    A loss that is not finite counts as 100, or as the largest one that is; ``num_broken`` are so.
    """

    loss: Tensor
    right: Tensor | None
    num_broken: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean over the examples."""
        return self.loss.mean().item()

    @property
    def accuracy(self) -> float | None:
        """Share of examples that were right."""
        return None if self.right is None else self.right.mean().item()

    def then(self, other: Scores) -> Scores:
        """These examples and then others."""
        both = (self.right, other.right)
        right = None if both[0] is None or both[1] is None else torch.cat([both[0], both[1]])
        loss, num_broken = torch.cat([self.loss, other.loss]), self.num_broken + other.num_broken
        return Scores(loss=loss, right=right, num_broken=num_broken)

    def gain_over(self, before: Scores) -> Gain:
        """What each example's loss has lost since, paired."""
        return paired_gain(before.loss - self.loss, binary=False)


class Judge:
    """Scores states of a model on the same examples.

    Args:
        halves: Held-out batches in two halves: what looks at one is judged by the other.
        metric: One value for each example; the smaller, the better.
        forward: How a batch goes through a model.
    """

    def __init__(self, halves: Halves, metric: Metric, forward: Forward) -> None:
        self.halves, self.metric, self._forward = halves, metric, forward

    def scores(self, model: nn.Module, what: str, half: int | None = None) -> Scores:
        """Score a model as it is now: its modes and buffers are the caller's affair.

        Args:
            model: The model.
            what: What is being done, for the person who waits.
            half: Which half judges; None for all examples, the first half's first.

        Raises:
            DataError: If the loss does not give one value for each example.
        """
        losses, right = list[Tensor](), list[Tensor]()

        def send(model: nn.Module, batch: Any) -> None:  # noqa: ANN401
            output = self._forward(model, batch)
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
    """Run a block with the model at evaluation; it is then as it was, buffers included."""
    return untouched(model, training=False)


@contextmanager
def with_statistics(model: nn.Module, values: Values):  # noqa: ANN201 - a context manager
    """Run a block at evaluation with other running statistics in some layers."""
    with at_evaluation(model):
        write(model, values)
        yield


@torch.no_grad()
def write(model: nn.Module, values: Values) -> None:
    """Write running statistics into layers."""
    for name, buffers in values.items():
        for key, buffer in statistics_of(model.get_submodule(name)).items():
            if key in buffers:
                buffer.copy_(buffers[key])
