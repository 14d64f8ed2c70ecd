"""Hooks, attributes, modules and buffers that code outside of its class has added to a norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from normkit.convert.bytecode import own_names
from normkit.errors import ConversionError

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
HELD = ("_parameters", "_buffers", "_modules")
COMPILED = "_compiled_call_impl"
"""The attribute where ``layer.compile()`` stores the compiled call, which is bound to the layer."""
WAY_OUT = "remove that first, or leave the layer out with where="


def carry_extras(new: nn.Module, old: nn.Module, read: Iterable[object]) -> list[str]:
    """Give the new layer the old layer's hooks, and everything else that was added to it.

    Both layers then share the dicts of hooks, so that existing handles remove hooks from both.

    Args:
        new: The layer that replaces the old one.
        old: The old layer; it is not changed.
        read: Parameters, buffers and modules of the old layer that are transferred in other ways.

    Returns:
        Names of what was transferred besides the hooks.

    Raises:
        ConversionError: If the new layer uses one of the names for something else, or if a hook or
            a value is bound to the old layer.
    """
    others = {id(value) for value in read}
    found = [name for name in added_names(old) if id(getattr(old, name)) not in others]
    _require_unbound(old, found)
    if clashing := [name for name in found if hasattr(new, name)]:
        raise ConversionError(
            f"other code has added {', '.join(clashing)} to it, which means something else in "
            f"{type(new).__name__}; {WAY_OUT}"
        )
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
    for name in found:
        _carry(new, old, name)
    return found


def is_compiled(layer: nn.Module) -> bool:
    """Whether ``layer.compile()`` was called; a new layer must be compiled again."""
    return vars(layer).get(COMPILED) is not None


def added_names(layer: nn.Module) -> list[str]:
    """Return the names of attributes and members that the code of the layer's class lacks."""
    held = [name for kind in HELD for name in vars(layer)[kind]]
    own = own_names(type(layer)) | vars(nn.Module()).keys() | {COMPILED}
    return [name for name in [*vars(layer), *held] if name not in own]


def _carry(new: nn.Module, old: nn.Module, name: str) -> None:
    for kind in HELD:
        if name in vars(old)[kind]:
            vars(new)[kind][name] = vars(old)[kind][name]
            new._non_persistent_buffers_set |= old._non_persistent_buffers_set & {name}
            return
    vars(new)[name] = vars(old)[name]


def _require_unbound(old: nn.Module, found: Iterable[str]) -> None:
    """Refuse hooks and values that are methods of the old layer, or contain the layer.

    Raises:
        ConversionError: If there are any; the error names the first one.
    """
    values = [(name, vars(old)[name]) for name in (*HOOKS, *found) if name in vars(old)]
    bound = next((name for name, value in values if refers_to(value, old)), None)
    if bound is not None:
        raise ConversionError(
            f"something in its {bound} is bound to this layer and would still use it after the "
            f"conversion; {WAY_OUT}"
        )


def refers_to(value: Any, layer: nn.Module) -> bool:
    """Whether a value is the layer, a method of it, or a container of one of these."""
    if value is layer or getattr(value, "__self__", None) is layer:
        return True
    # torch wraps hooks that get the module in an object with ``with_module`` and a weak reference.
    if getattr(value, "with_module", False):
        return value.module() is layer
    if isinstance(value, partial):
        value = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        value = tuple(value.values())
    several = value if isinstance(value, list | tuple | set | frozenset) else ()
    return any(refers_to(each, layer) for each in several if not isinstance(each, Tensor))
