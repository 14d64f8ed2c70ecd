"""Finding the norms of a model, and choosing which to replace and by what."""

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
from normkit.text import listed, module_name
from normkit.tracing.kinds import is_norm

Where = Callable[[nn.Module, str], bool]
SpecMap = Mapping[str, str | NormSpec | None]
NamedNorms = dict[nn.Module, list[str]]
"""Norms of a model, each with all of its names."""
TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes of every module, in which torch keeps children, parameters, buffers and hooks."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The specs of the norms to replace, and for each other norm why it stays."""

    specs: Mapping[nn.Module, NormSpec]
    left: Mapping[nn.Module, str]


def find_norms(model: nn.Module) -> NamedNorms:
    """Find the norms of a model with all of their names; parts of a norm are not listed."""
    found: NamedNorms = {}
    for name, module in _walk(model, ""):
        if is_norm(module):
            found.setdefault(module, []).append(name)
    return found


def find_lookalikes(model: nn.Module) -> dict[str, nn.Module]:
    """Find modules without children whose class name contains "norm" but that are no known norm."""
    return {
        name: module
        for name, module in _walk(model, "")
        if not is_norm(module)
        and "norm" in type(module).__name__.lower()
        and not any(module.children())
    }


@dataclass(frozen=True, slots=True, eq=False)
class HiddenNorm:
    """A norm that torch has not registered: in a Python list, a plain attribute or a bound method.

    Args:
        name: Name of the attribute that refers to it.
        norm: The norm.
        holder: The list or dict where it can be replaced; None if that is not possible.
        key: Its index or key in ``holder``.
    """

    name: str
    norm: nn.Module
    holder: list[Any] | dict[Any, Any] | None
    key: Any


def find_hidden(model: nn.Module) -> list[HiddenNorm]:
    """Find norms that attributes refer to without registering them, which forwards may call too."""
    seen: set[int] = {id(module) for module in model.modules()}
    return [
        hidden
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in TORCH_ATTRIBUTES
        for hidden in _hidden_in(value, f"{name}.{key}" if name else key, vars(module), key, seen)
    ]


def _hidden_in(
    value: Any,
    name: str,
    holder: Any,
    key: Any,
    seen: set[int],
) -> Iterator[HiddenNorm]:
    """Search containers, bound methods and modules that are not registered."""
    if isinstance(value, nn.Module) and is_norm(value):
        yield HiddenNorm(name, value, holder if isinstance(holder, list | dict) else None, key)
    elif parts := {} if id(value) in seen else _parts(value):
        seen.add(id(value))
        for each, part in list(parts.items()):
            yield from _hidden_in(part, name, value, each, seen)


def _parts(value: Any) -> Mapping[Any, Any]:
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
    """Visit a module under all of its names; cycles between modules are followed only once."""
    yield name, module
    if is_norm(module):
        return
    above = (*above, module)
    for key, child in module._modules.items():
        if child is not None and key != "parametrizations" and child not in above:
            yield from _walk(child, f"{name}.{key}" if name else key, above)


def choose(found: NamedNorms, wanted: str | NormSpec | SpecMap, where: Where | None) -> Chosen:
    """Choose for each norm its new spec, or say why it stays.

    Raises:
        SpecError: If a spec cannot be read.
        OptionError: If the model has no norm, a pattern or ``where`` chooses none, or earlier
            patterns have chosen all norms of a pattern.
    """
    if not found:
        raise OptionError(
            "the model has no normalization layer, so there is nothing to convert; only registered "
            "modules are found, not norms in a Python list or functions such as F.batch_norm: use "
            "an nn.ModuleList and norm modules"
        )
    if where is not None and not callable(where):
        raise OptionError(
            f"where={where!r} was given; it must be a function of a module and its name. To choose "
            f"norms by name, pass a dict as the spec: {{'layer1.*': 'gn:32'}}"
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


def _by_pattern(
    found: NamedNorms, wanted: str | NormSpec | SpecMap
) -> dict[nn.Module, NormSpec | str]:
    if isinstance(wanted, str | NormSpec):
        spec = NormSpec.parse(wanted)
        return dict.fromkeys(found, spec)
    if not isinstance(wanted, Mapping):
        raise SpecError(
            f"{wanted!r} was given; it must be a spec such as 'gn:32', or a dict from names to "
            f"specs"
        )
    if not wanted:
        raise OptionError("an empty dict was given, which names no norm; write {'*': 'gn:32'}")
    tests = {pattern: _test(pattern) for pattern in wanted}
    _require_matches(found, tests)
    specs = {k: None if spec is None else NormSpec.parse(spec) for k, spec in wanted.items()}
    _require_effect(found, tests, specs)
    return {module: _first_match(names, tests, specs) for module, names in found.items()}


def _require_effect(
    found: NamedNorms,
    tests: Mapping[str, Callable[[str], bool]],
    specs: Mapping[str, NormSpec | None],
) -> None:
    """Refuse a pattern if all of its norms match earlier patterns with other specs.

    Raises:
        OptionError: If there is such a pattern; the error names it and the earlier ones.
    """
    earlier: dict[nn.Module, str] = {}
    for pattern, matches in tests.items():
        named = [module for module, names in found.items() if any(map(matches, names))]
        taken = {earlier[module] for module in named if module in earlier}
        others = [each for each in taken if specs[each] != specs[pattern]]
        if others and all(module in earlier for module in named):
            raise OptionError(
                f"pattern {pattern!r} has no effect: all of its norms match "
                f"{', '.join(map(repr, sorted(others)))} before it, and the first match counts; "
                f"put it first"
            )
        earlier |= {module: pattern for module in named if module not in earlier}


def _first_match(
    names: list[str],
    tests: Mapping[str, Callable[[str], bool]],
    specs: Mapping[str, NormSpec | None],
) -> NormSpec | str:
    for pattern, matches in tests.items():
        if any(map(matches, names)):
            return specs[pattern] or f"{pattern!r} leaves it alone"
    return "no pattern names it"


def _test(pattern: str) -> Callable[[str], bool]:
    """Compile a pattern: ``re:`` and a regular expression, or a name in which ``*`` is a wildcard.

    A name also matches everything inside the module.

    Raises:
        OptionError: If the pattern is not a string, or its regular expression is invalid.
    """
    if not isinstance(pattern, str):
        raise OptionError(
            f"{pattern!r} was given as a pattern; it must be a string such as 'layer1.*'"
        )
    if not pattern.startswith("re:"):
        return lambda name: fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    try:
        compiled = re.compile(pattern[3:])
    except re.error as error:
        raise OptionError(f"{pattern!r} is not a valid regular expression: {error}") from error
    return lambda name: compiled.fullmatch(name) is not None


def _require_matches(found: NamedNorms, tests: Mapping[str, Callable[[str], bool]]) -> None:
    from difflib import get_close_matches  # slow import

    names = [name for several in found.values() for name in several]
    for pattern, matches in tests.items():
        if not any(map(matches, names)):
            close = get_close_matches(pattern, names)
            hint = f"close names are {', '.join(close)}" if close else f"they are: {_shown(found)}"
            raise OptionError(f"pattern {pattern!r} matches none of the {len(found)} norms; {hint}")


def _shown(found: NamedNorms) -> str:
    return listed((module_name(names[0]) for names in found.values()), at_most=8)
