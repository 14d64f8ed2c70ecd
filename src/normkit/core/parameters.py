"""What a layer learns or is given beside the statistics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from normkit.typing import FeatureMap, PerChannel


class Parameters(NamedTuple):
    """What a layer adds to the statistics: scale and shift of each channel, and ``eps``."""

    weight: PerChannel | None
    bias: PerChannel | None
    eps: float


def empty_result(x: FeatureMap, *parameters: Tensor | None) -> FeatureMap:
    """Nothing to normalise, yet the parameters get zero gradients instead of none."""
    sums = [p.sum().to(x.dtype) for p in parameters if p is not None]
    return x + sum(sums) if sums else x.clone()
