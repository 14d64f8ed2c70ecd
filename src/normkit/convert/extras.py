"""What others have hung on a norm: attributes, modules and buffers that its class does not know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from normkit.convert.code import own_names
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
"""Where ``layer.compile()`` leaves its result, which calls that very layer."""
WAY_OUT = "take that away first, or leave the layer alone with where="


def carry_extras(new: nn.Module, old: nn.Module, read: Iterable[object]) -> list[str]:
    """Give the new layer the hooks of the old one, and everything that others have hung on it.

    Both layers have the same hooks, so that handles given out before remove them.

    Args:
        new: The layer that replaces the old one.
        old: Left as it is.
        read: Parameters, buffers and modules of the old one that are carried otherwise.

    Returns:
        Names of what was carried besides the hooks.

    Raises:
        ConversionError: If a name means something in the new layer, or a hook or a value would go
            on using the old one.
    """
    others = {id(value) for value in read}
    found = [name for name in hung_on(old) if id(getattr(old, name)) not in others]
    _require_unbound(old, found)
    if clashing := [name for name in found if hasattr(new, name)]:
        raise ConversionError(
            f"somebody has hung {', '.join(clashing)} on it, which means something else in "
            f"{type(new).__name__}; {WAY_OUT}"
        )
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
    for name in found:
        _carry(new, old, name)
    return found


def is_compiled(layer: nn.Module) -> bool:
    """Whether ``layer.compile()`` was called, which no other layer takes over."""
    return vars(layer).get(COMPILED) is not None


def hung_on(layer: nn.Module) -> list[str]:
    """Names of attributes, parameters, buffers and modules that the code of its class lacks."""
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
    """Refuse hooks and values that are the old layer's own methods, or hold the layer.

    Raises:
        ConversionError: With the first one's name.
    """
    values = [(name, vars(old)[name]) for name in (*HOOKS, *found) if name in vars(old)]
    bound = next((name for name, value in values if refers_to(value, old)), None)
    if bound is not None:
        raise ConversionError(
            f"something in its {bound} is bound to this very layer and would go on using it; "
            f"{WAY_OUT}"
        )


def refers_to(value: Any, layer: nn.Module) -> bool:  # noqa: ANN401 - whatever somebody has hung
    """Whether a value is a layer, a method of it, or holds one of these."""
    if value is layer or getattr(value, "__self__", None) is layer:
        return True
    if getattr(value, "with_module", False):  # how torch binds hooks that get the module
        return value.module() is layer
    if isinstance(value, partial):
        value = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        value = tuple(value.values())
    several = value if isinstance(value, list | tuple | set | frozenset) else ()
    return any(refers_to(each, layer) for each in several if not isinstance(each, Tensor))
