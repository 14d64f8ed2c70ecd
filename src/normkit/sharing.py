"""Which elements of a feature map share statistics, for every layer in its mode."""

from __future__ import annotations

from torch import nn

from normkit.errors import InputTypeError
from normkit.layers.base import NormLayer
from normkit.layers.parts import Origin, Part

__all__ = ["Origin", "Part", "parts"]


def parts(layer: nn.Module) -> tuple[Part, ...]:
    """Say by which statistics a layer normalises, in its mode, and which elements share them.

    Args:
        layer: One of normkit's layers, or a class of yours that is made from one.

    Returns:
        One part for each norm that the layer is made of; two where running statistics are averaged
        with the example's own.

    Raises:
        InputTypeError: If the layer is not one of normkit's.

    Example:
        >>> from normkit import BatchNorm
        >>> [part.origin for part in parts(BatchNorm(6).eval())]
        ['running']
    """
    if not isinstance(layer, NormLayer):
        raise InputTypeError(
            f"explain was given a {type(layer).__name__}; it explains normkit's own layers"
        )
    return layer.parts()
