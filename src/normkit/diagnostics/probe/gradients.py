"""Gradients of the chosen parameters, and how far they move between two steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Params = Callable[[str, nn.Parameter], bool]
Gradients = Mapping[str, Tensor]
"""By the names of the parameters; those without a gradient are not in it."""


def gradients_of(model: nn.Module, params: Params | None) -> dict[str, Tensor]:
    """Gradients as they are: of scaled losses scaled, after clipping clipped."""
    return {
        name: p.grad.detach()
        for name, p in model.named_parameters()
        if p.grad is not None and (params is None or params(name, p))
    }


def kept(gradients: Gradients) -> dict[str, Tensor]:
    """Copies, which the next backward pass does not write into."""
    return {name: grad.clone() for name, grad in gradients.items()}


def changes(now: Gradients, before: Gradients) -> dict[str, Tensor]:
    """What was added since the step before; a gradient that is missing is zero."""
    names = dict.fromkeys([*now, *before])
    return {name: _minus(now.get(name), before.get(name)) for name in names}


def lengths(vectors: Gradients) -> tuple[float | None, dict[str, float]]:
    """Length of all vectors together, and of those of each layer, in float64."""
    if not vectors:
        return None, {}
    each = [torch.linalg.vector_norm(dense(v), dtype=torch.float64) for v in vectors.values()]
    first = each[0].device
    numbers = torch.stack([length.to(first) for length in each]).tolist()  # waits for it once
    layers: dict[str, list[float]] = defaultdict(list)
    for name, number in zip(vectors, numbers, strict=True):
        layers[name.rpartition(".")[0]].append(number)
    return _together(numbers), {name: _together(parts) for name, parts in layers.items()}


def dense(vector: Tensor) -> Tensor:
    """Write out what an embedding may keep sparse."""
    return vector if vector.layout == torch.strided else vector.to_dense()


def _together(parts: Iterable[float]) -> float:
    return sum(part * part for part in parts) ** 0.5


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        given = a if a is not None else b
        return torch.zeros(()) if given is None else given
    return dense(a).double() - dense(b)
