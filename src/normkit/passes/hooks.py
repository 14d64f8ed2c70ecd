"""Hooks that are surely taken out again, and that no copy of the model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Hooks:
    """Forward hooks in the modules of a model, each known before it is put in.

    A handle of torch's is known only after its hook is in, and an interruption may come between.
    """

    def __init__(self) -> None:
        self._known: list[tuple[nn.Module, Callable[..., Any]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """Let the hook be called before a module runs; see ``register_forward_pre_hook``."""
        self._known.append((module, hook))
        module.register_forward_pre_hook(hook, **options)

    def after(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """Let the hook be called when a module is done; see ``register_forward_hook``."""
        self._known.append((module, hook))
        module.register_forward_hook(hook, **options)

    def remove(self) -> None:
        """Take out all hooks that are still in; twice is once."""
        for module, hook in self._known:
            for held in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, each in held.items() if each is hook]:
                    _forget(module, key)


def _forget(module: nn.Module, key: int) -> None:
    """Remove a hook by the number that it alone has, and last from where it is found by."""
    for name in ("_with_kwargs", "_always_called", ""):
        vars(module).get(f"_forward_hooks{name}", {}).pop(key, None)
        vars(module).get(f"_forward_pre_hooks{name}", {}).pop(key, None)


class Temporary:
    """A hook that ends with a block; in a copy of the model it does nothing.

    Args:
        act: What is called with what torch gives a hook.
    """

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act

    def __call__(self, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - what hooks get and give
        """Do what the hook does."""
        return self._act(*args, **named)

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class Inert:
    """Stands for a temporary hook in a copy of the model, and does nothing."""

    def __call__(self, *_given: Any, **_named: Any) -> None:  # noqa: ANN401
        """Do nothing."""


def swaps_statistics(module: nn.Module) -> bool:
    """Whether what stands for a forward lets the module write its statistics elsewhere."""
    return getattr(vars(module).get("forward"), "swaps_statistics", False)
