"""Hooks of a block that ends: a copy or a pickle of the model made inside of it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Temporary:
    """A hook that ends with a block; in a copy of the model it does nothing.

    Args:
        act: What is called with what torch gives a hook.
        swaps_statistics: Whether it lets the layer write its statistics elsewhere.
    """

    def __init__(self, act: Callable[..., Any], *, swaps_statistics: bool = False) -> None:
        self._act, self.swaps_statistics = act, swaps_statistics

    def __call__(self, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - what hooks get and give
        """Do what the hook does."""
        return self._act(*args, **named)

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


def swaps_statistics(module: nn.Module) -> bool:
    """Whether a hook lets this module write its statistics elsewhere while it runs."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, Temporary) and hook.swaps_statistics for hook in hooks)


class Inert:
    """Stands for a temporary hook in a copy of the model, and does nothing."""

    def __call__(self, *_given: Any, **_named: Any) -> None:  # noqa: ANN401
        """Do nothing."""
