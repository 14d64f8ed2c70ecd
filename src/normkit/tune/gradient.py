"""A weight for every layer, found by gradient steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normkit.errors import DataError
from normkit.passes import device_of, moved, progress
from normkit.tune.layers import Weights
from normkit.tune.sweep import Sweep

NUM_STEPS = 20
STEP_SIZE = 0.03  # of Adam: about how far a weight moves in one step


def descend(sweep: Sweep, start: Weights) -> dict[str, float]:
    r"""Weights of all layers, from those at the start, by the examples at even places.

    .. math::  \alpha \leftarrow \min(\max(\alpha - \mathrm{Adam}(\nabla L), 0), 1)

    Every step takes the gradient over all these examples; the weights of the best step are given,
    which are the start's if no step was better.

    Args:
        sweep: Model, metric and data.
        start: The weights that layers begin with.

    Raises:
        DataError: If the metric has no gradient.
    """
    names = list(sweep.layers.named)
    wide = all(p.dtype == torch.float64 for p in sweep.model.parameters())
    first = [start[name] if isinstance(start, Mapping) else start for name in names]
    weights = torch.tensor(first, dtype=torch.float64 if wide else torch.float32)
    optimizer = torch.optim.Adam([weights], lr=STEP_SIZE)
    best, least = weights.clone(), float("inf")
    for step in progress(range(NUM_STEPS + 1), "following the gradient of example weights"):
        slope, cost = gradient(sweep, weights)
        _require_slope(slope, step, sweep.metric.name)
        if cost < least:
            best, least = weights.clone(), cost
        weights.grad = slope
        optimizer.step()
        weights.clamp_(0, 1)
    return dict(zip(names, best.tolist(), strict=True))


def gradient(sweep: Sweep, weights: Tensor) -> tuple[Tensor, float]:
    """Gradient ``(L,)`` and mean of what is to become small, over the examples at even places.

    Args:
        sweep: Model, metric and data.
        weights: One of each layer, ``(L,)``.
    """
    device = device_of(sweep.model)
    slope, cost, num_seen = torch.zeros_like(weights), 0.0, 0
    with sweep.undisturbed(), torch.no_grad():
        for batch in sweep.batches:
            costs = _Costs(sweep, moved(batch, device), num_seen)
            found, value = torch.func.grad_and_value(costs.total)(weights.to(device))
            slope, cost = slope + found.to(slope), cost + value.item()
            num_seen += costs.num_examples
    num_chosen = (num_seen + 1) // 2
    return slope / num_chosen, cost / num_chosen


class _Costs:
    """What is to become small, of one batch.

    Args:
        sweep: Model, metric and data.
        batch: The batch.
        place: Place of its first example among all.
    """

    def __init__(self, sweep: Sweep, batch: Any, place: int) -> None:  # noqa: ANN401 - see passes
        self.sweep, self.batch, self.place = sweep, batch, place
        self.num_examples = 0

    def total(self, weights: Tensor) -> Tensor:
        """Sum over the examples at even places; a gradient flows to the weights ``(L,)``.

        Under ``torch.func`` layers compute their plain formula, which lets the gradient through.
        """
        sweep = self.sweep
        for layer, weight in zip(sweep.layers.named.values(), weights, strict=True):
            layer._example_weight = weight[None, None]
        scores = sweep.metric.of(sweep.forward(sweep.model, self.batch), self.batch)
        self.num_examples = len(scores)
        total = scores[self.place % 2 :: 2].sum()
        return -total if sweep.metric.larger_is_better else total


def _require_slope(slope: Tensor, step: int, name: str) -> None:
    if step == 0 and not slope.any():
        raise DataError(
            f"the gradient of the metric {name} is 0 for all example weights; per_layer=True "
            f"follows it: give a metric that is computed from the output in differentiable "
            f"operations, or per_layer=False"
        )
