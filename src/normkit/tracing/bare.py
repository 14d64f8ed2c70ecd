"""Models that something else holds on to, which must not be changed underneath it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normkit.errors import InputTypeError, OptionError

HOLDERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
COMPILED = ("OptimizedModule", "ScriptModule")


def require_bare(model: nn.Module, verb: str) -> None:
    """Refuse a model that is, or has inside, a wrapped or a compiled one.

    Args:
        model: The model.
        verb: What is to be done to it, as in ``"convert"``.

    Raises:
        OptionError: With the wrapper and the way out; also of a model that ``torch.export`` has
            made, whose norms are calls of functions.
        InputTypeError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"a {type(model).__name__} was given to {verb}; it takes a torch.nn.Module"
        )
    require_modules(model, verb)
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        at = _at(name)
        for kind in kinds.intersection(HOLDERS):
            raise OptionError(
                f"{at} is inside {kind}, which holds on to its parameters; {verb} the model "
                f"first and wrap it afterwards"
            )
        for kind in kinds.intersection(COMPILED):
            raise OptionError(
                f"{at} is compiled ({kind}), and would go on as it was; {verb} the model first "
                f"and compile it afterwards"
            )


def require_modules(model: nn.Module, verb: str) -> None:
    """Refuse a model that ``torch.export`` has made, or that has one inside.

    Args:
        model: The model.
        verb: What is to be done to it, as in ``"convert"``.

    Raises:
        OptionError: With the way out.
    """
    for name, module in model.named_modules():
        if _is_exported(module):
            raise OptionError(
                f"{_at(name)} is exported: its forward is a graph of operators, with no norm in it "
                f"as a module; {verb} the model that it was exported from"
            )


def _is_exported(module: nn.Module) -> bool:
    """Whether its forward is a graph that calls operators of torch's dispatcher."""
    if not any(kind.__name__ == "GraphModule" for kind in type(module).__mro__):
        return False
    graph: Any = module.graph
    return any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes)


def _at(name: str) -> str:
    return f"module {name!r}" if name else "the model"
