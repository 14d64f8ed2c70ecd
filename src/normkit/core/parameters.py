"""A layer's parameters, and the result of an empty input."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from normkit.typing import FeatureMap, PerChannel


class Parameters(NamedTuple):
    """Scale and shift of each channel, and ``eps``."""

    weight: PerChannel | None
    bias: PerChannel | None
    eps: float


def empty_result(x: FeatureMap, *parameters: Tensor | None) -> FeatureMap:
    """Return an empty map whose backward gives the parameters gradients of zero, not None."""
    sums = [p.sum().to(x.dtype) for p in parameters if p is not None]
    return x + sum(sums) if sums else x.clone()
