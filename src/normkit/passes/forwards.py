"""Another forward for a module for a while, and calling a model with an example input."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Function = Callable[..., Any]


@contextmanager
def forward_of(module: nn.Module, make: Callable[[Function], Function]) -> Generator[None]:
    """Run the block with another forward of a module, then put back what was there.

    Unlike a hook, it is also called by a parent that calls ``module.forward`` itself.

    Args:
        module: The module.
        make: Makes the new forward; given the old one.
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


def call_with(model: nn.Module, example_input: Any) -> Any:  # noqa: ANN401
    """Call a model with a tuple of arguments, a dict of named ones, or the only one."""
    if isinstance(example_input, dict):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, tuple) else model(example_input)


def copied(example_input: Any) -> Any:  # noqa: ANN401
    """Copy the tensors of an example input, into which a forward may write."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), example_input)
