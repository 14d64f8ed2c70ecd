"""The classes of norms whose forward is known to normalise exactly its input.

Classes of other libraries are listed by module and name, so that none is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType

from torch import nn

from normkit.layers.base import BUFFERS, NormLayer
from normkit.passes import swaps_statistics

BATCH_NORM_ACTS = ("timm.layers.norm_act.BatchNormAct2d",)
SYNC_BATCH_NORM_ACTS = ("timm.layers.norm_act.SyncBatchNormAct",)
GROUP_NORMS = ("timm.layers.norm.GroupNorm", "timm.layers.norm.GroupNorm1")
GROUP_NORM_ACTS = ("timm.layers.norm_act.GroupNormAct", "timm.layers.norm_act.GroupNorm1Act")
LAYER_NORMS = ("timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNormFp32")
LAYER_NORM_ACTS = ("timm.layers.norm_act.LayerNormAct", "timm.layers.norm_act.LayerNormActFp32")
"""Layer norms over the last axis, without and with an activation."""

MAP_NORMS = (
    "torchvision.models.convnext.LayerNorm2d",
    "timm.layers.norm.LayerNorm2d",
    "timm.layers.norm.LayerNorm2dFp32",
    "timm.layers.norm.LayerNormExp2d",
)
MAP_NORM_ACTS = ("timm.layers.norm_act.LayerNormAct2d", "timm.layers.norm_act.LayerNormAct2dFp32")
"""Layer norms over the channels of maps ``(N, C, H, W)``, without and with an activation."""
FIXED = ("torchvision.ops.misc.FrozenBatchNorm2d", "detectron2.layers.batch_norm.FrozenBatchNorm2d")
FIXED_ACTS = ("timm.layers.norm_act.FrozenBatchNormAct2d",)
"""Batch norms that never update their statistics, in any mode."""

KNOWN = frozenset((
    *BATCH_NORM_ACTS, *SYNC_BATCH_NORM_ACTS, *GROUP_NORMS, *GROUP_NORM_ACTS, *LAYER_NORMS,
    *LAYER_NORM_ACTS, *MAP_NORMS, *MAP_NORM_ACTS, *FIXED, *FIXED_ACTS,
))  # fmt: skip


def normalizes_its_input(layer: nn.Module) -> bool:
    """Whether a norm is known to normalise exactly the tensor that it is called with.

    That holds for the classes of torch and normkit, for the classes of timm and torchvision listed
    above, and for subclasses without a forward of their own.

    Example:
        >>> class Tokens(nn.BatchNorm1d):
        ...     def forward(self, x):
        ...         return super().forward(x.transpose(1, 2)).transpose(1, 2)
        >>> normalizes_its_input(nn.BatchNorm1d(4)), normalizes_its_input(Tokens(4))
        (True, False)
    """
    return not _is_replaced(layer) and _is_known(_owner_of_forward(layer))


def is_over_maps(layer: nn.Module) -> bool:
    """Whether this is a known layer norm for maps, with the channels in the second axis."""
    return name_of(_owner_of_forward(layer)) in MAP_NORMS + MAP_NORM_ACTS


def is_fixed(layer: nn.Module) -> bool:
    """Whether this batch norm never updates its statistics; projects also copy such classes."""
    buffers = {"weight", "bias", *BUFFERS}
    has_name = type(layer).__name__ == "FrozenBatchNorm2d"
    is_copy = has_name and layer._buffers.keys() == buffers and not layer._parameters
    return is_copy or name_of(type(layer)) in FIXED + FIXED_ACTS


def describe_own_forward(layer: nn.Module) -> str:
    """Say, for a message, where a layer's unknown forward comes from."""
    if _is_replaced(layer):
        return f"its forward was replaced by {getattr(layer.forward, '__qualname__', 'another')}"
    return f"its class {name_of(_owner_of_forward(layer))} has a forward of its own"


def may_depend_on_mode(layer: nn.Module) -> bool:
    """Whether unknown code of a layer reads ``training``, so that it may act on the mode."""
    return any("training" in f.__code__.co_names for f in _unknown_functions(layer))


def name_of(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _unknown_functions(layer: nn.Module) -> Iterator[FunctionType]:
    """Functions of a layer and of its classes, up to the first known base class."""
    yield from (value for value in vars(layer).values() if isinstance(value, FunctionType))
    for kind in type(layer).__mro__:
        if _is_known(kind):
            return
        yield from (value for value in vars(kind).values() if isinstance(value, FunctionType))


def _is_replaced(layer: nn.Module) -> bool:
    """Whether this instance has another forward than its class."""
    own = vars(layer).get("forward")
    # The class's forward, and the wrapper of ``accumulate_statistics``, replace nothing.
    plain = getattr(own, "__func__", None) is type(layer).forward or swaps_statistics(layer)
    return own is not None and not plain


def _owner_of_forward(layer: nn.Module) -> type:
    return next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))


def _is_known(kind: type) -> bool:
    if issubclass(kind, NormLayer):
        return kind.__module__.partition(".")[0] == "normkit"
    return kind.__module__.startswith("torch.nn.modules.") or name_of(kind) in KNOWN
