"""Which modules, functions and methods are activations that a norm can apply itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from normkit.convert.rules import key_of
from normkit.kernels.activations import ActivationName

SLOPE = 0.01
SUMS = ("add", "iadd", "add_")
IN_PLACE_SUMS = ("iadd", "add_")


class Known(NamedTuple):
    """The name of an activation, and the slope of a leaky ReLU."""

    name: ActivationName
    slope: float = SLOPE


_KINDS: tuple[tuple[type | str, ActivationName], ...] = (
    (nn.ReLU, "relu"),
    (nn.SiLU, "silu"),
    (nn.Hardswish, "hardswish"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
    (nn.ReLU6, "relu6"),
    ("timm.layers.activations.Swish", "silu"),
    ("timm.layers.activations.HardSwish", "hardswish"),
    ("timm.layers.activations.Sigmoid", "sigmoid"),
    ("timm.layers.activations.Tanh", "tanh"),
)
_MODULES: dict[str, ActivationName] = {key_of(kind): name for kind, name in _KINDS}
_FUNCTIONS: dict[Callable[..., Any], ActivationName] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    F.tanh: "tanh",
    F.relu6: "relu6",
    torch.tanh: "tanh",
}
_METHODS: dict[str, ActivationName] = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}


def of_module(module: nn.Module) -> Known | None:
    """The activation that a module computes; None if no norm can apply it."""
    if isinstance(module, nn.LeakyReLU) and type(module) is nn.LeakyReLU:
        return Known("leaky_relu", float(module.negative_slope))
    if type(module) is nn.GELU or key_of(type(module)) == "timm.layers.activations.GELU":
        return Known("gelu") if getattr(module, "approximate", "none") == "none" else None
    name = _MODULES.get(key_of(type(module)))
    return None if name is None else Known(name)


def of_node(node: fx.Node, root: nn.Module) -> Known | None:
    """The activation that a call computes; None if no norm can apply it."""
    if node.op == "call_module":
        return of_module(root.get_submodule(str(node.target)))
    given = {k: v for k, v in node.kwargs.items() if k not in ("input", "inplace")}
    extra = [v for v in node.args[1:] if not isinstance(v, bool)]  # a bool is ``inplace``
    if node.op == "call_function" and node.target is F.leaky_relu:
        slope = given.get("negative_slope", extra[0] if extra else SLOPE)
        return Known("leaky_relu", float(slope)) if isinstance(slope, int | float) else None
    if extra or given.keys() - {"approximate"} or given.get("approximate", "none") != "none":
        return None
    if node.op == "call_function" and callable(node.target):
        name = _FUNCTIONS.get(node.target)
    else:
        name = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    return None if name is None else Known(name)
