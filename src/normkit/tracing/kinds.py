"""What a module or an operation is to somebody who follows a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normkit.layers.base import NormLayer

Kind = Literal["producer", "norm", "move", "sum", "ask", "other", "constant", "input", "output"]

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
"""How the names of norms of other libraries begin that are no subclass of torch's."""

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
"""Operations that pass values on as they are: elsewhere, in another shape or dtype, or dropped."""

ASKS = frozenset((
    "getattr", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
    "is_floating_point", "get_device",
))  # fmt: skip
"""Operations that ask something about a tensor and use none of its values."""

OF_NONE = frozenset((
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_empty", "new_full",
))  # fmt: skip
"""Operations that make a new tensor and ask another one for its shape or dtype."""

OF_FIRST = frozenset({"view_as", "reshape_as", "type_as", "expand_as"})
"""Operations that take the values of their first argument, and ask the second for its shape."""

VALUES = frozenset({"T", "mT", "data"})
"""Attributes of a tensor that have its values."""

SUMS = frozenset({"add", "iadd"})


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalization layer: torch's, ours, a subclass, or one known by name.

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
    """Kind of a call of this module."""
    if is_norm(module):
        return "norm"
    if is_producer(module):
        return "producer"
    return "move" if isinstance(module, MOVING_MODULES) else "other"


def kind_of_operation(name: str) -> Kind:
    """Kind of a call of a function or method of this name."""
    if name in MOVES:
        return "move"
    if name in ASKS:
        return "ask"
    return "sum" if name in SUMS else "other"


def value_arguments(name: str, arguments: Sequence[Any]) -> Sequence[Any]:
    """Those arguments of an operation whose values it uses, in their order."""
    return arguments[: 0 if name in OF_NONE else 1 if name in OF_FIRST else None]


def plain_name(target: object) -> str:
    """Name of a function or method without the decoration of dunder and in-place names.

    Reading an attribute of a tensor is named as the attribute.
    """
    name = str(getattr(target, "__name__", target))
    if name == "__get__":
        name = str(getattr(getattr(target, "__self__", None), "__name__", name))
    return name.strip("_")
