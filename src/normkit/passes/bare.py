"""Models that something else holds on to, and models whose layers nobody can look into."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normkit.errors import InputTypeError, OptionError

HOLDERS = ("DataParallel", "DistributedDataParallel")
SHARDED = ("FullyShardedDataParallel", "FSDPModule")
SCRIPTED = ("ScriptModule",)
QUANTIZED = tuple(
    f"torch.{package}.{kind}"
    for package in ("ao.nn", "nn")
    for kind in ("quantized.modules", "intrinsic.quantized", "quantized.reference")
)
"""How the modules of torch's quantized layers begin; those quantized at run time are left whole."""
HIDING = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "normkit")
"""Parts of the names of functions that are norms in a graph of functions."""


def bare(model: nn.Module, verb: str) -> nn.Module:
    """Return a model without DistributedDataParallel, DataParallel and ``torch.compile``.

    Args:
        model: The model.
        verb: What is to be done to it, as in ``"recalibrate"``.

    Raises:
        OptionError: If its layers cannot be looked into: it is scripted, exported, sharded or
            quantized, or a part of it is. The error has the way out.
        InputTypeError: If it is no module.
    """
    require_layers(model, verb)
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def require_bare(model: nn.Module, verb: str) -> None:
    """Refuse a model that is, or has inside, a wrapped or a compiled one.

    Args:
        model: The model.
        verb: What is to be done to it, as in ``"convert"``.

    Raises:
        OptionError: With the wrapper and the way out.
        InputTypeError: If it is no module.
    """
    require_layers(model, verb)
    for name, module in model.named_modules():
        for kind in _kinds(module).intersection(HOLDERS):
            raise OptionError(
                f"{_place(name)} is inside {kind}, which holds on to its parameters; {verb} the "
                f"model first and wrap it afterwards"
            )
        if "OptimizedModule" in _kinds(module):
            raise OptionError(
                f"{_place(name)} is compiled (OptimizedModule), and would go on as it was; {verb} "
                f"the model first and compile it afterwards"
            )


def require_layers(model: nn.Module, verb: str, *, sharded: bool = False) -> None:
    """Refuse a model whose layers cannot be looked into, or a part of which cannot.

    Args:
        model: The model.
        verb: What is to be done to it, as in ``"convert"``.
        sharded: Take a model whose layers have parts of their parameters, as long as each of
            these is a parameter of its own.

    Raises:
        OptionError: With the way out.
        InputTypeError: If it is no module.
    """
    _require_module(model, verb)
    for name, module in model.named_modules():
        if why := _why_closed(module, sharded):
            raise OptionError(f"{_place(name)} {why.format(verb=verb)}")


def require_uncompiled(model: nn.Module, verb: str) -> None:
    """Refuse a model that is, or has inside, a compiled one, which does not see later hooks.

    Raises:
        OptionError: With the way out.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise OptionError(
                f"{_place(name)} is compiled, which does not see hooks that come later; {verb} the "
                f"model that is not"
            )


def _require_module(model: Any, verb: str) -> None:  # noqa: ANN401 - whatever was given
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"a {type(model).__name__} was given to {verb}; it takes a torch.nn.Module"
        )


def _why_closed(module: nn.Module, sharded: bool) -> str:
    """Why nobody can look into a module; empty if one can."""
    kinds = _kinds(module)
    if kinds.intersection(SCRIPTED):
        return (
            "is compiled (ScriptModule): its layers cannot be looked into, and it would go on as "
            "it was; {verb} the model first and script or trace it afterwards"
        )
    flat = "_flat_param" in module._parameters
    for kind in kinds.intersection(SHARDED) if flat or not sharded else ():
        return (
            f"is sharded ({kind}): its layers have parts of their parameters, and its forward "
            f"waits for other processes; {{verb}} the model first and shard it afterwards"
        )
    if any(kind.__module__.startswith(QUANTIZED) for kind in type(module).__mro__):
        return (
            f"is quantized ({type(module).__name__}), so it no longer computes with the values of "
            f"its parameters; {{verb}} the model first and quantize it afterwards"
        )
    if "GraphModule" in kinds and _calls_operators(module):
        return (
            "is exported: its forward is a graph of operators, with no norm in it as a module; "
            "{verb} the model that it was exported from"
        )
    if "GraphModule" in kinds and (function := _hidden_norm(module)):
        return (
            f"is a graph of functions (GraphModule) whose norms are calls of {function}, not "
            f"modules; {{verb}} the model first and trace it afterwards"
        )
    return ""


def _calls_operators(module: Any) -> bool:  # noqa: ANN401 - torch.fx is not imported for this
    """Whether a graph calls operators of torch's dispatcher, as those of ``torch.export`` do."""
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def _hidden_norm(module: Any) -> str:  # noqa: ANN401 - torch.fx is not imported for this
    """A function that normalises in a graph; empty if norms are called as modules."""
    called = (node.target for node in module.graph.nodes if node.op == "call_function")
    found = next((each for each in called if any(part in str(each) for part in HIDING)), None)
    return "" if found is None else getattr(found, "__name__", str(found))


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper wraps."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        return model.module
    inner = None if _kinds(model).intersection(SCRIPTED) else model._modules.get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else None


def _kinds(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _place(name: str) -> str:
    return f"module {name!r}" if name else "the model"
