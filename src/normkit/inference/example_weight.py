"""Inference example weighing for a whole model."""

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

    with an example's own statistics ``e, v_e`` and the running ones ``m_r, v_r``.

    Args:
        model: Holds layers of normkit; composites weigh in their batch stage. It may be inside
            DistributedDataParallel, or compiled.
        alpha: From 0, the running statistics alone, to 1, the example's own alone.

    Returns:
        Names of the layers that were set; layers without running statistics are not.

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
            f"{type(model).__name__} has no layer of normkit with running statistics, so there is "
            f"nothing to weigh; build it with norm_layer=normkit.BatchNorm (its keys are torch's)"
        )
    for layer in layers.values():
        layer.example_weight = alpha
    return tuple(layers)
