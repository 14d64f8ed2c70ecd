"""Removing wrappers such as DistributedDataParallel, and refusing models that hide their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normkit.errors import InputTypeError, OptionError

WRAPPERS = ("DataParallel", "DistributedDataParallel")
SHARDED = ("FullyShardedDataParallel", "FSDPModule")
SCRIPTED = ("ScriptModule",)
QUANTIZED = tuple(
    f"torch.{package}.{kind}"
    for package in ("ao.nn", "nn")
    for kind in ("quantized.modules", "intrinsic.quantized", "quantized.reference")
)
"""Module prefixes of torch's statically quantized layers; dynamically quantized ones are accepted.

Dynamic quantization keeps norms in floating point.
"""
NORM_FUNCTIONS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "normkit")
"""A function whose name contains one of these, called in an fx graph, is a norm."""


def unwrap(model: nn.Module, verb: str) -> nn.Module:
    """Return a model without DistributedDataParallel, DataParallel and ``torch.compile``.

    Args:
        model: The model.
        verb: What the caller does to the model, for the error text, as in ``"recalibrate"``.

    Raises:
        OptionError: If the model or a part of it hides its layers: it is scripted, exported,
            sharded or quantized. The error names the way out.
        InputTypeError: If ``model`` is not a module.
    """
    require_inspectable(model, verb)
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def require_unwrapped(model: nn.Module, verb: str) -> None:
    """Refuse a model that is wrapped or compiled, or contains a wrapped or compiled part.

    Args:
        model: The model.
        verb: What the caller does to the model, for the error text, as in ``"convert"``.

    Raises:
        OptionError: If it is; the error names the wrapper and the way out.
        InputTypeError: If ``model`` is not a module.
    """
    require_inspectable(model, verb)
    for name, module in model.named_modules():
        for kind in _kinds(module).intersection(WRAPPERS):
            raise OptionError(
                f"{_place(name)} is inside {kind}, which keeps references to its parameters; "
                f"{verb} the model first and wrap it afterwards"
            )
        if "OptimizedModule" in _kinds(module):
            raise OptionError(
                f"{_place(name)} is compiled (OptimizedModule), and its compiled code would not "
                f"change; {verb} the model first and compile it afterwards"
            )


def require_inspectable(model: nn.Module, verb: str, *, sharded: bool = False) -> None:
    """Refuse a model if it, or a part of it, hides its layers.

    Args:
        model: The model.
        verb: What the caller does to the model, for the error text, as in ``"convert"``.
        sharded: Accept a sharded model, as long as every shard belongs to one parameter. FSDP1's
            flat parameters, which join several into one, stay refused.

    Raises:
        OptionError: If it does; the error names the way out.
        InputTypeError: If ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"a {type(model).__name__} was given to {verb}; it takes a torch.nn.Module"
        )
    for name, module in model.named_modules():
        if why := _why_hidden(module, sharded):
            raise OptionError(f"{_place(name)} {why.format(verb=verb)}")


def require_uncompiled(model: nn.Module, verb: str) -> None:
    """Refuse a model with a compiled part, because compiled code ignores hooks added later.

    Raises:
        OptionError: If there is a compiled part; the error names the way out.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise OptionError(
                f"{_place(name)} is compiled, and compiled code does not run hooks added later; "
                f"{verb} the uncompiled model"
            )


def _why_hidden(module: nn.Module, sharded: bool) -> str:
    """Say why the layers of a module are hidden; empty if they are not."""
    kinds = _kinds(module)
    if kinds.intersection(SCRIPTED):
        return (
            "is compiled (ScriptModule): its layers are not accessible from Python, and its "
            "compiled code would not change; {verb} the model first and script or trace it "
            "afterwards"
        )
    flat = "_flat_param" in module._parameters
    for kind in kinds.intersection(SHARDED) if flat or not sharded else ():
        return (
            f"is sharded ({kind}): each process holds only a part of the parameters, and the "
            f"forward waits for other processes; {{verb}} the model first and shard it afterwards"
        )
    if any(kind.__module__.startswith(QUANTIZED) for kind in type(module).__mro__):
        return (
            f"is quantized ({type(module).__name__}), so it does not compute with its "
            f"floating-point parameters any more; {{verb}} the model first and quantize it "
            f"afterwards"
        )
    if "GraphModule" in kinds and _calls_operators(module):
        return (
            "is exported: its forward is a graph of operators that contains no norm modules; "
            "{verb} the model that it was exported from"
        )
    if "GraphModule" in kinds and (function := _norm_function(module)):
        return (
            f"is a graph of functions (GraphModule) whose norms are calls of {function}, not "
            f"modules; {{verb}} the model first and trace it afterwards"
        )
    return ""


def _calls_operators(module: Any) -> bool:
    """Whether a graph calls operators of torch's dispatcher, as graphs of ``torch.export`` do."""
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def _norm_function(module: Any) -> str:
    """Name of the first norm that a graph calls as a function; empty if there is none."""
    called = (node.target for node in module.graph.nodes if node.op == "call_function")
    norms = (each for each in called if any(part in str(each) for part in NORM_FUNCTIONS))
    found = next(norms, None)
    return "" if found is None else getattr(found, "__name__", str(found))


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, or None if the model is not a wrapper."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        return model.module
    inner = None if _kinds(model).intersection(SCRIPTED) else model._modules.get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else None


def _kinds(module: nn.Module) -> set[str]:
    """Names of a module's class and its base classes."""
    return {kind.__name__ for kind in type(module).__mro__}


def _place(name: str) -> str:
    return f"module {name!r}" if name else "the model"
