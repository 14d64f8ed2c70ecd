"""Find an example weight for each layer by gradient descent."""

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
STEP_SIZE = 0.03  # Adam's learning rate: a weight changes by about this much in one step.


def descend(sweep: Sweep, start: Weights) -> dict[str, float]:
    r"""Optimise the weights of all layers on the examples at even places.

    .. math::  \alpha \leftarrow \min(\max(\alpha - \mathrm{Adam}(\nabla L), 0), 1)

    Every step uses the gradient over all these examples.

    Args:
        sweep: Model, metric and data.
        start: The weights to start from.

    Returns:
        By layer name, the weights of the best step, or ``start`` if no step was better.

    Raises:
        DataError: If the metric has no gradient.
    """
    names = list(sweep.layers.named)
    is_float64 = all(p.dtype == torch.float64 for p in sweep.model.parameters())
    first = [start[name] if isinstance(start, Mapping) else start for name in names]
    weights = torch.tensor(first, dtype=torch.float64 if is_float64 else torch.float32)
    optimizer = torch.optim.Adam([weights], lr=STEP_SIZE)
    best, lowest_cost = weights.clone(), float("inf")
    for step in progress(range(NUM_STEPS + 1), "following the gradient of example weights"):
        grad, cost = gradient(sweep, weights)
        if step == 0 and not grad.any():
            raise DataError(
                f"the gradient of the metric {sweep.metric.name} is 0 for all example weights, and "
                f"per_layer=True needs it; give a metric that is computed from the output by "
                f"differentiable operations, or per_layer=False"
            )
        if cost < lowest_cost:
            best, lowest_cost = weights.clone(), cost
        weights.grad = grad
        optimizer.step()
        weights.clamp_(0, 1)
    return dict(zip(names, best.tolist(), strict=True))


def gradient(sweep: Sweep, weights: Tensor) -> tuple[Tensor, float]:
    """Compute the mean cost over the examples at even places, and its gradient ``(L,)``.

    The cost is the metric, with the opposite sign if larger values of the metric are better.

    Args:
        sweep: Model, metric and data.
        weights: The weight of each layer, ``(L,)``.
    """
    device = device_of(sweep.model)
    grad, cost, num_examples = torch.zeros_like(weights), 0.0, 0
    with sweep.evaluation_mode(), torch.no_grad():
        for batch in sweep.batches:
            costs = _BatchCost(sweep, moved(batch, device), num_examples)
            found, value = torch.func.grad_and_value(costs.total)(weights.to(device))
            grad, cost = grad + found.to(grad), cost + value.item()
            num_examples += costs.num_examples
    num_even = (num_examples + 1) // 2
    return grad / num_even, cost / num_even


class _BatchCost:
    """The cost of one batch, as a function of the weights.

    Args:
        sweep: Model, metric and data.
        batch: The batch.
        place: Place of the batch's first example among all examples.
    """

    def __init__(self, sweep: Sweep, batch: Any, place: int) -> None:
        self.sweep, self.batch, self.place = sweep, batch, place
        self.num_examples = 0

    def total(self, weights: Tensor) -> Tensor:
        """Sum the cost over the examples at even places, differentiably in the weights ``(L,)``.

        Under ``torch.func`` layers use their plain formula, which is differentiable in the weights.
        """
        sweep = self.sweep
        for layer, weight in zip(sweep.layers.named.values(), weights, strict=True):
            layer._example_weight = weight[None, None]
        scores = sweep.metric.of(sweep.forward(sweep.model, self.batch), self.batch)
        self.num_examples = len(scores)
        total = scores[self.place % 2 :: 2].sum()
        return -total if sweep.metric.larger_is_better else total
