"""Temporary forward hooks: reliably removed, and not active in copies of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Hooks:
    """Forward hooks on the modules of a model, each recorded before it is registered.

    torch returns a handle only after it has registered the hook. An interruption in between would
    lose the handle, so hooks are found again by the function itself.
    """

    def __init__(self) -> None:
        self._known: list[tuple[nn.Module, Callable[..., Any]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """Call the hook before each forward of a module; see ``register_forward_pre_hook``."""
        self._known.append((module, hook))
        module.register_forward_pre_hook(hook, **options)

    def after(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """Call the hook after each forward of a module; see ``register_forward_hook``."""
        self._known.append((module, hook))
        module.register_forward_hook(hook, **options)

    def remove(self) -> None:
        """Remove all hooks that are still registered; a second call does nothing."""
        for module, hook in self._known:
            for held in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, each in held.items() if each is hook]:
                    _remove_by_id(module, key)


def _remove_by_id(module: nn.Module, key: int) -> None:
    """Remove a hook by its id, which is unique among all hooks.

    The dict of the hooks themselves comes last: ``Hooks.remove`` finds the hook there, so it can
    repeat an interrupted removal.
    """
    for name in ("_with_kwargs", "_always_called", ""):
        vars(module).get(f"_forward_hooks{name}", {}).pop(key, None)
        vars(module).get(f"_forward_pre_hooks{name}", {}).pop(key, None)


class TemporaryHook:
    """A hook for the duration of a block; in copies of the model it becomes an ``InertHook``.

    Args:
        act: The hook function, called with the arguments that torch passes to the hook.
    """

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Call the hook function."""
        return self._act(*args, **named)

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


class InertHook:
    """Takes the place of a ``TemporaryHook`` in a copy of the model, and does nothing."""

    def __call__(self, *_given: Any, **_named: Any) -> None:
        """Do nothing."""


def swaps_statistics(module: nn.Module) -> bool:
    """Whether the module's replaced forward makes it write its statistics to other buffers."""
    return getattr(vars(module).get("forward"), "swaps_statistics", False)
