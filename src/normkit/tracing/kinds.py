"""The roles that modules and operations have in a traced model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normkit.layers.base import NormLayer

Kind = Literal["producer", "norm", "move", "sum", "query", "other", "constant", "input", "output"]
"""The role of a call.

A ``"producer"`` is a convolution or linear layer, a ``"move"`` passes values on without computing
with them, and a ``"query"`` only asks for a shape, dtype or device.
"""

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, NormLayer)
FOREIGN_NORMS = ("FrozenBatchNorm", "EvoNorm", "FilterResponseNorm", "InplaceAbn", "RmsNorm")
"""Prefixes of the class names of other libraries' norms that do not subclass torch's."""

MOVING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
MOVES = frozenset((
    "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "permute", "transpose",
    "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT", "data", "detach", "contiguous",
    "squeeze", "unsqueeze", "cat", "concat", "stack", "chunk", "split", "unbind", "getitem",
    "narrow", "select", "roll", "flip", "pad", "clone", "to", "type_as", "float", "half",
    "bfloat16", "double", "type", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "checkpoint",
))  # fmt: skip
"""Operations that move, reshape, cast or drop values, and compute nothing with them."""

QUERIES = frozenset((
    "getattr", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
    "is_floating_point", "get_device",
))  # fmt: skip
"""Operations that ask a tensor for its shape, dtype or device and use none of its values."""

USING_NO_VALUES = frozenset((
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_empty", "new_full",
))  # fmt: skip
"""Operations that create a tensor, and only take its shape or dtype from another tensor."""

USING_FIRST_VALUES = frozenset({"view_as", "reshape_as", "type_as", "expand_as"})
"""Operations that use the values of their first argument, and the shape or dtype of the second."""

VALUE_ATTRIBUTES = frozenset({"T", "mT", "data"})
"""Attributes of a tensor that contain its values; other attributes are queries."""

SUMS = frozenset({"add", "iadd"})


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalization layer: torch's, normkit's, or another known by its name.

    Example:
        >>> is_norm(nn.BatchNorm2d(4)), is_norm(nn.ReLU())
        (True, False)
    """
    names = (base.__name__ for base in type(module).__mro__)
    return isinstance(module, NORMS) or any(name.startswith(FOREIGN_NORMS) for name in names)


def is_producer(module: nn.Module) -> bool:
    """Whether this is a convolution or a linear layer, whose output a norm may take.

    Example:
        >>> is_producer(nn.Conv2d(4, 8, 3)), is_producer(nn.BatchNorm2d(4))
        (True, False)
    """
    return isinstance(module, (*CONVOLUTIONS, nn.Linear))


def kind_of_module(module: nn.Module) -> Kind:
    """Return the kind of a call of this module."""
    if is_norm(module):
        return "norm"
    if is_producer(module):
        return "producer"
    return "move" if isinstance(module, MOVING_MODULES) else "other"


def kind_of_operation(name: str) -> Kind:
    """Return the kind of a call of a function or method with this name."""
    if name in MOVES:
        return "move"
    if name in QUERIES:
        return "query"
    return "sum" if name in SUMS else "other"


def value_arguments(name: str, arguments: Sequence[Any]) -> Sequence[Any]:
    """Select the arguments of an operation whose values it uses, in order."""
    if name in USING_NO_VALUES:
        return arguments[:0]
    return arguments[:1] if name in USING_FIRST_VALUES else arguments


def plain_name(target: object) -> str:
    """Return the name of a function or method without leading and trailing underscores.

    Reading an attribute of a tensor calls its ``__get__``; the name is then the attribute's.
    """
    name = str(getattr(target, "__name__", target))
    if name == "__get__":
        name = str(getattr(getattr(target, "__self__", None), "__name__", name))
    return name.strip("_")
