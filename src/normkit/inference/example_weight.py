"""Set the example weight of all layers of a model (inference example weighing)."""

from __future__ import annotations

from torch import nn

from normkit.core.check import require_share
from normkit.errors import OptionError
from normkit.inference.tracked import tracked
from normkit.layers.base import TrackingLayer
from normkit.passes import all_or_nothing, unwrap


@all_or_nothing
def set_example_weight(model: nn.Module, alpha: float) -> tuple[str, ...]:
    r"""Give every layer with running statistics the same example weight.

    .. math::  m = \alpha e + (1 - \alpha) m_r, \quad
               v = \alpha v_e + (1 - \alpha) v_r + \alpha (1 - \alpha) (e - m_r)^2

    At evaluation a layer normalises by the mean :math:`m` and variance :math:`v`, which mix an
    example's own statistics :math:`e, v_e` with the running statistics :math:`m_r, v_r`.

    Args:
        model: Holds layers of normkit; composites mix in their batch stage. It may be inside
            DistributedDataParallel, or compiled.
        alpha: Share of the example's own statistics, from 0 to 1; 0 uses only the running
            statistics, 1 only the example's.

    Returns:
        Names of the layers that were set; layers without running statistics are left alone.

    Raises:
        OptionError: If ``alpha`` lies outside 0 to 1, or no layer of normkit in the model has
            running statistics; then nothing is changed.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, 3.1.

    Example:
        >>> import normkit as nk
        >>> set_example_weight(nn.Sequential(nk.BatchNorm(6), nk.GroupNorm(6, num_groups=3)), 0.2)
        ('0',)
    """
    require_share("example_weight", alpha)
    layers = {
        name: layer
        for name, layer in tracked(unwrap(model, "weigh")).items()
        if isinstance(layer, TrackingLayer)
    }
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no layer of normkit with running statistics, so no "
            f"example weight can be set; build it with norm_layer=normkit.BatchNorm, whose state "
            f"dict has torch's names"
        )
    for layer in layers.values():
        layer.example_weight = alpha
    return tuple(layers)
