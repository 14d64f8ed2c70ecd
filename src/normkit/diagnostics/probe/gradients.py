"""Gradients of the chosen parameters, and how much they change between two steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Params = Callable[[str, nn.Parameter], bool]
Gradients = Mapping[str, Tensor]
"""Gradients by parameter name; parameters without a gradient are left out."""

PIECE = 2**15  # elements; 256 KiB in float64, which fits a core's cache


def gradients_of(model: nn.Module, params: Params | None) -> dict[str, Tensor]:
    """Read the chosen parameters' ``.grad`` as it is now, possibly scaled or clipped."""
    return {
        name: p.grad.detach()
        for name, p in model.named_parameters()
        if p.grad is not None and (params is None or params(name, p))
    }


def lengths(
    vectors: Gradients, minus: Gradients | None = None
) -> tuple[float | None, dict[str, float]]:
    """L2 norm of all vectors together, and of the vectors of each layer, in float64.

    Args:
        vectors: Vectors by parameter name.
        minus: Subtracted first; a vector that is missing in one of the two counts as zero.
    """
    names: list[str] = list(dict.fromkeys([*vectors, *(minus or {})]))
    if not names:
        return None, {}
    each = [_square(vectors.get(name), (minus or {}).get(name)) for name in names]
    # One stacked tensor makes the host wait for the device once, not once for each parameter.
    squares = torch.stack([s.to(each[0].device) for s in each]).tolist()
    layers: dict[str, float] = defaultdict(float)
    for name, square in zip(names, squares, strict=True):
        layers[name.rpartition(".")[0]] += square
    return sum(squares) ** 0.5, {name: square**0.5 for name, square in layers.items()}


def _square(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Squared norm of ``a - b``; on the CPU in pieces whose float64 copies fit the cache."""
    first, *rest = (_flat(vector) for vector in (a, b) if vector is not None)
    if first.device.type != "cpu" or first.numel() <= PIECE:
        return _square_of_piece(first, *rest)
    pieces = zip(*(vector.split(PIECE) for vector in (first, *rest)), strict=True)
    return torch.stack([_square_of_piece(*piece) for piece in pieces]).sum()


def _square_of_piece(a: Tensor, b: Tensor | None = None) -> Tensor:
    wide = a.to(torch.float64, copy=b is not None)
    if b is not None:
        wide.sub_(b)
    return wide.dot(wide)


def _flat(vector: Tensor) -> Tensor:
    """Flatten a vector; an embedding's sparse gradient becomes dense."""
    dense = vector if vector.layout == torch.strided else vector.to_dense()
    return dense.flatten()
