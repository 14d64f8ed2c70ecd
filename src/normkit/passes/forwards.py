"""Replacing a module's forward temporarily, and calling a model with an example input."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Function = Callable[..., Any]


@contextmanager
def replaced_forward(module: nn.Module, make: Callable[[Function], Function]) -> Generator[None]:
    """Replace a module's forward inside the block, then restore it.

    Unlike a hook, the new forward also runs when a parent calls ``module.forward`` directly.

    Args:
        module: The module.
        make: Takes the old forward and returns the new one.
    """
    own: Function | None = vars(module).get("forward")
    vars(module)["forward"] = make(module.forward)
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def call_with(model: nn.Module, example_input: Any) -> Any:
    """Call a model with a tuple of arguments, a dict of keyword arguments, or a single argument."""
    if isinstance(example_input, dict):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, tuple) else model(example_input)


def copied(example_input: Any) -> Any:
    """Copy the tensors of an example input, because a forward may modify its input in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), example_input)
