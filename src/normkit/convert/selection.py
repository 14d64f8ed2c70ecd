"""Which norms of a model are meant, and what each is to become."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from normkit.errors import OptionError, SpecError
from normkit.spec import NormSpec
from normkit.tracing.kinds import is_norm

Where = Callable[[nn.Module, str], bool]
SpecMap = Mapping[str, str | NormSpec | None]
Found = dict[nn.Module, list[str]]
OWN_PLACES = frozenset(vars(nn.Module()))
"""Attributes of every module: registered children, parameters, hooks."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What each norm is to become, or why it is left alone."""

    specs: Mapping[nn.Module, NormSpec]
    left: Mapping[nn.Module, str]


def find_norms(model: nn.Module) -> Found:
    """Find the norms of a model with all their names; what is inside of one is its own affair."""
    found: Found = {}
    for name, module in _walk(model, ""):
        if is_norm(module):
            found.setdefault(module, []).append(name)
    return found


def find_lookalikes(model: nn.Module) -> dict[str, nn.Module]:
    """Find what is named like a norm and is none that is known."""
    return {
        name: module
        for name, module in _walk(model, "")
        if not is_norm(module)
        and "norm" in type(module).__name__.lower()
        and not any(module.children())
    }


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """A norm in a place that torch does not look into: a Python list, a method, a plain attribute.

    Args:
        name: Of the attribute in which it is.
        norm: The norm.
        holder: The list or dict that has it; None if it can be exchanged in none.
        key: Its place there.
    """

    name: str
    norm: nn.Module
    holder: list[Any] | dict[Any, Any] | None
    key: Any


def find_hidden(model: nn.Module) -> list[Hidden]:
    """Find norms in places that torch does not look into, where they may be called as well."""
    seen: set[int] = {id(module) for module in model.modules()}
    return [
        hidden
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in OWN_PLACES
        for hidden in _hidden_in(value, f"{name}.{key}" if name else key, vars(module), key, seen)
    ]


def _hidden_in(
    value: Any,  # noqa: ANN401 - whatever somebody keeps in a module
    name: str,
    holder: Any,  # noqa: ANN401
    key: Any,  # noqa: ANN401
    seen: set[int],
) -> Iterator[Hidden]:
    """Look into containers, bound methods and modules that are not registered."""
    if isinstance(value, nn.Module) and is_norm(value):
        yield Hidden(name, value, holder if isinstance(holder, list | dict) else None, key)
    elif parts := {} if id(value) in seen else _parts(value):
        seen.add(id(value))
        for each, part in list(parts.items()):
            yield from _hidden_in(part, name, value, each, seen)


def _parts(value: Any) -> Mapping[Any, Any]:  # noqa: ANN401
    if isinstance(value, dict):
        return value
    if isinstance(value, nn.Module):
        return {key: child for key, child in value._modules.items() if child is not None}
    if isinstance(value, MethodType):
        return {"": value.__self__}
    if isinstance(value, partial):
        value = (value.func, *value.args, *value.keywords.values())
    containers = list | tuple | set | frozenset
    return dict(enumerate(value)) if isinstance(value, containers) else {}


def _walk(
    module: nn.Module, name: str, above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Visit a module under all of its names; one that holds what holds it ends there."""
    yield name, module
    if is_norm(module):
        return
    above = (*above, module)
    for key, child in module._modules.items():
        if child is not None and key != "parametrizations" and child not in above:
            yield from _walk(child, f"{name}.{key}" if name else key, above)


def choose(found: Found, wanted: str | NormSpec | SpecMap, where: Where | None) -> Chosen:
    """Say for each norm what it is to become, or why it is left alone.

    Raises:
        SpecError: If a spec cannot be read.
        OptionError: If a pattern or ``where`` chooses nothing or comes too late to, or there is
            nothing to choose.
    """
    if not found:
        raise OptionError(
            "the model has no normalization layer, so there is nothing to convert; norms in a "
            "Python list, and functions such as F.batch_norm that a forward calls, are not seen: "
            "only modules, also in an nn.ModuleList"
        )
    if where is not None and not callable(where):
        raise OptionError(
            f"where={where!r} was given; it is a function of a module and its name. Names go into "
            f"a dict: {{'layer1.*': 'gn:32'}}"
        )
    by_pattern = _by_pattern(found, wanted)
    specs: dict[nn.Module, NormSpec] = {}
    left: dict[nn.Module, str] = {}
    for module, names in found.items():
        if where is not None and not where(module, names[0]):
            left[module] = "where= leaves it out"
        elif isinstance(spec := by_pattern[module], NormSpec):
            specs[module] = spec
        else:
            left[module] = spec
    if where is not None and len(left) == len(found):
        raise OptionError(
            f"where= chooses none of the {len(found)} norms; they are: {_shown(found)}"
        )
    return Chosen(specs, left)


def _by_pattern(found: Found, wanted: str | NormSpec | SpecMap) -> dict[nn.Module, NormSpec | str]:
    if isinstance(wanted, str | NormSpec):
        spec = NormSpec.parse(wanted)
        return dict.fromkeys(found, spec)
    if not isinstance(wanted, Mapping):
        raise SpecError(
            f"{wanted!r} was given; it is a spec such as 'gn:32', or a dict from names to specs"
        )
    if not wanted:
        raise OptionError("an empty dict was given, which names no norm; write {'*': 'gn:32'}")
    tests = {pattern: _test(pattern) for pattern in wanted}
    _require_matches(found, tests)
    specs = {k: None if spec is None else NormSpec.parse(spec) for k, spec in wanted.items()}
    _require_effect(found, tests, specs)
    return {module: _first(names, tests, specs) for module, names in found.items()}


def _require_effect(
    found: Found,
    tests: Mapping[str, Callable[[str], bool]],
    specs: Mapping[str, NormSpec | None],
) -> None:
    """Refuse a pattern that says something of its norms, all of which earlier ones have taken."""
    earlier: dict[nn.Module, str] = {}
    for pattern, matches in tests.items():
        named = [module for module, names in found.items() if any(map(matches, names))]
        taken = {earlier[module] for module in named if module in earlier}
        others = [each for each in taken if specs[each] != specs[pattern]]
        if others and all(module in earlier for module in named):
            raise OptionError(
                f"pattern {pattern!r} has no effect: {', '.join(map(repr, sorted(others)))} before "
                f"it names all of its norms, and the first pattern counts; put it first"
            )
        earlier |= {module: pattern for module in named if module not in earlier}


def _first(
    names: list[str],
    tests: Mapping[str, Callable[[str], bool]],
    specs: Mapping[str, NormSpec | None],
) -> NormSpec | str:
    for pattern, matches in tests.items():
        if any(map(matches, names)):
            return specs[pattern] or f"{pattern!r} leaves it alone"
    return "no pattern names it"


def _test(pattern: str) -> Callable[[str], bool]:
    """Read a pattern: ``re:`` and a regular expression, or a name with ``*`` for anything.

    Raises:
        OptionError: If it is no text, or no regular expression.
    """
    if not isinstance(pattern, str):
        raise OptionError(f"{pattern!r} was given as a pattern; it is a text such as 'layer1.*'")
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    try:
        compiled = re.compile(pattern[3:])
    except re.error as error:
        raise OptionError(f"{pattern!r} is no regular expression: {error}") from error
    return lambda name: compiled.fullmatch(name) is not None


def _require_matches(found: Found, tests: Mapping[str, Callable[[str], bool]]) -> None:
    from difflib import get_close_matches  # noqa: PLC0415 - slow import

    names = [name for several in found.values() for name in several]
    for pattern, matches in tests.items():
        if not any(map(matches, names)):
            close = get_close_matches(pattern, names)
            hint = f"close names are {', '.join(close)}" if close else f"they are: {_shown(found)}"
            raise OptionError(f"pattern {pattern!r} matches none of the {len(found)} norms; {hint}")


def _shown(found: Found, at_most: int = 8) -> str:
    names = [several[0] or "the model itself" for several in found.values()]
    return ", ".join(names[:at_most]) + (", ..." if len(names) > at_most else "")
