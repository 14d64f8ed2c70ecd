"""Which elements of a feature map share statistics in a layer."""

from __future__ import annotations

from torch import nn

from normkit.errors import InputTypeError
from normkit.layers.base import NormLayer
from normkit.layers.parts import Origin, Part

__all__ = ["Origin", "Part", "parts"]


def parts(layer: nn.Module) -> tuple[Part, ...]:
    """Return the statistics with which a layer normalises in its current mode.

    Args:
        layer: One of normkit's layers, or of a subclass.

    Returns:
        One part for each norm that the layer consists of, or two if it averages running statistics
        with the example's own. A part says which elements share statistics.

    Raises:
        InputTypeError: If the layer is not one of normkit's.

    Example:
        >>> from normkit import BatchNorm
        >>> [part.origin for part in parts(BatchNorm(6).eval())]
        ['running']
    """
    if not isinstance(layer, NormLayer):
        raise InputTypeError(
            f"explain was given a {type(layer).__name__}; it explains normkit's own layers only: "
            f"convert the layer first with convert_norm"
        )
    return layer.parts()
