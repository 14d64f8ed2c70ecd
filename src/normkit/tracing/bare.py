"""Models that something else holds on to, which must not be changed underneath it."""

from __future__ import annotations

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
        OptionError: With the wrapper and the way out.
        InputTypeError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"a {type(model).__name__} was given to {verb}; it takes a torch.nn.Module"
        )
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        at = f"module {name!r}" if name else "the model"
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
