"""Gradients of the chosen parameters, and how far they move between two steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Params = Callable[[str, nn.Parameter], bool]
Gradients = Mapping[str, Tensor]
"""By the names of the parameters; those without a gradient are not in it."""

PIECE = 2**15  # elements; 256 KiB in float64


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


def lengths(
    vectors: Gradients, minus: Gradients | None = None
) -> tuple[float | None, dict[str, float]]:
    """Length of all vectors together, and of those of each layer, in float64.

    Args:
        vectors: By the names of the parameters.
        minus: What is taken from them first; a vector that is missing, here or there, is zero.
    """
    names: list[str] = list(dict.fromkeys([*vectors, *(minus or {})]))
    if not names:
        return None, {}
    each = [_square(vectors.get(name), (minus or {}).get(name)) for name in names]
    squares = torch.stack([s.to(each[0].device) for s in each]).tolist()  # waits for it once
    layers: dict[str, float] = defaultdict(float)
    for name, square in zip(names, squares, strict=True):
        layers[name.rpartition(".")[0]] += square
    return sum(squares) ** 0.5, {name: square**0.5 for name, square in layers.items()}


def _square(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Squared length of ``a - b``, piece by piece: wide copies of large ones do not fit a cache."""
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
    """One axis, with what an embedding keeps sparse written out."""
    dense = vector if vector.layout == torch.strided else vector.to_dense()
    return dense.flatten()
