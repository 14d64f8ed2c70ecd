"""Norms by name: ``"gn:32"`` and what it means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar, get_args

from torch import nn

from normkit.core.check import require_count
from normkit.core.composite import Order
from normkit.core.partition import divisors, largest_divisor
from normkit.errors import PartitionError, SpecError
from normkit.kernels.activations import ActivationName
from normkit.layers.batch_channel import ChannelAffine
from normkit.recipes import (
    MAX_NUMBER,
    METHODS,
    Recipe,
    recipe_of,
    recommended_bgn_groups,
    require_size,
)
from normkit.text import shortened

__all__ = ["METHODS", "NormSpec", "Value", "build", "parse_specs", "recommended_bgn_groups"]

Value = int | float | bool | str | None
T = TypeVar("T")

MAX_LENGTH = 400  # characters of a spec

WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Order": get_args(Order),
        "ChannelAffine": get_args(ChannelAffine),
        "ActivationName | None": get_args(ActivationName),
    }
)
"""Options that are one of a few words, by the name of their annotation."""

LIMIT, CHANNELS = "max", "channels"
SIZES = ("", LIMIT, CHANNELS)
"""Arguments that decide the number of groups, in the order in which they are written."""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm and its options, before the number of channels is known.

    Grammar: ``name(:argument)*(+ws)``. An argument is a number (the method's own: groups, or the
    ghost batch size), ``auto`` (by batch size), ``max=K`` (the largest divisor of the size at hand
    that is at most K), ``channels=M`` (groups of M channels each; with ``max=K`` at most K groups
    of at least M channels, which is one group where there are fewer channels), a flag, or
    ``option=value``; there is never a comma, so that lists of specs are comma-separated.

    Args:
        name: One of the names in ``METHODS``.
        arguments: Texts between the colons, in canonical order: unnamed first, then by name.
        standardize_weights: Whether ``+ws`` asks for weight standardization before the norm.

    Raises:
        SpecError: From ``parse``, with the known names or options.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, table 2: ``min(32, channels / 4)`` groups, ``"gn:max=32:channels=4"``.

    Example:
        >>> NormSpec.parse("gbgn:8:examples=2")
        NormSpec('gbgn:8:examples_per_group=2')
        >>> str(NormSpec.parse("gn:max=8").resolve(20))
        'gn:5'
        >>> [str(NormSpec.parse("gn:max=32:channels=4").resolve(size)) for size in (64, 256)]
        ['gn:16', 'gn:32']
    """

    name: str
    arguments: tuple[tuple[str, Value], ...] = ()
    standardize_weights: bool = False

    def __post_init__(self) -> None:
        recipe_of(self.name, self.name)

    @classmethod
    def parse(cls, text: str | NormSpec) -> NormSpec:
        """Read a spec; one that is read already is returned as it is."""
        if isinstance(text, NormSpec):
            return text
        if not isinstance(text, str):
            raise SpecError(f"a spec is a text or a NormSpec; {text!r} was given")
        if len(text) > MAX_LENGTH:
            raise SpecError(
                f"a spec of {len(text)} characters was given, {text[:20]!r}...; it has at most "
                f"{MAX_LENGTH}"
            )
        body, *suffixes = text.strip().split("+")
        if suffixes not in ([], ["ws"]):
            raise SpecError(f"spec {text!r} ends in +{'+'.join(suffixes)}; the only suffix is +ws")
        name, *arguments = body.split(":")
        recipe = recipe_of(name, text)
        read = dict(_read(argument, recipe, text) for argument in arguments)
        if len(read) < len(arguments) or {"", LIMIT} <= read.keys():
            raise SpecError(f"spec {text!r} sets an option twice; name each option once")
        if {"", CHANNELS} <= read.keys():
            raise SpecError(
                f"spec {text!r} gives the number of groups and the channels of a group; give one"
            )
        return cls(name, tuple(sorted(read.items(), key=_place)), bool(suffixes))

    def __str__(self) -> str:
        texts = [_print(key, value) for key, value in self.arguments]
        return ":".join([self.name, *texts]) + ("+ws" if self.standardize_weights else "")

    def __repr__(self) -> str:
        return f"NormSpec({str(self)!r})"

    @property
    def norm_alone(self) -> NormSpec:
        """The spec without ``+ws``: what stands at the place of the norm itself."""
        return replace(self, standardize_weights=False)

    def resolve(
        self, num_features: int, *, batch_size: int | None = None, num_positions: int | None = None
    ) -> NormSpec:
        """Replace ``auto``, ``max=K`` and ``channels=M`` by the number they mean for a layer.

        Args:
            num_features: Channels of the layer.
            batch_size: Examples per worker; ``auto`` needs it.
            num_positions: Product of the spatial sizes at the layer; without it BGN's groups are
                chosen among the divisors of ``num_features``, which always fit.

        Raises:
            SpecError: If ``auto`` is asked for without a batch size, or a size is too large.
            OptionError: If a size is no whole number of at least 1.
            PartitionError: If groups of M channels do not make up the layer's.
        """
        require_size("num_features", num_features)
        positions = 1 if num_positions is None else require_size("num_positions", num_positions)
        given = dict(self.arguments)
        limit, channels = given.pop(LIMIT, None), given.pop(CHANNELS, None)
        if given.get("") == "auto":
            limit = self._automatic(batch_size)
        if limit is None and channels is None:
            return self
        size = num_features * (positions if METHODS[self.name].over_positions else 1)
        at_most = [] if limit is None else [_checked(LIMIT, limit)]
        if channels is not None:
            at_most.append(self._num_groups(num_features, channels, exact=limit is None))
        given[""] = largest_divisor(size, at_most=min(at_most))
        return replace(self, arguments=tuple(sorted(given.items())))

    def build(
        self, num_features: int, *, batch_size: int | None = None, num_positions: int | None = None
    ) -> nn.Module:
        """Build the layer for ``num_features`` channels; see ``normkit.build``."""
        if self.standardize_weights:
            raise SpecError(
                f"{self} asks for weight standardization, which concerns the layer before the "
                f"norm; build the norm alone, {str(self.norm_alone)!r}, and call "
                f"standardize_weights_ on the model"
            )
        found = self.resolve(num_features, batch_size=batch_size, num_positions=num_positions)
        recipe = METHODS[self.name]
        options = {key or str(recipe.argument): value for key, value in found.arguments}
        unknown = options.keys() - recipe.options().keys()
        if unknown:
            raise SpecError(
                f"{self} sets {', '.join(sorted(unknown))}; its options are: "
                f"{', '.join(recipe.options())}"
            )
        return recipe.layer(num_features, **options)

    def _num_groups(self, num_features: int, channels: Value, exact: bool) -> int:
        """How many groups of so many channels there are, or of at least so many."""
        size = _checked(CHANNELS, channels)
        if exact and num_features % size:
            raise PartitionError(
                f"{self} was given for a layer of {num_features} channels, which groups of {size} "
                f"do not make up; choose one of {divisors(num_features)}, or say the most groups "
                f"as well: {replace(self, arguments=((LIMIT, 32), *self.arguments))}"
            )
        return max(1, num_features // size)

    def _automatic(self, batch_size: int | None) -> int:
        rule = METHODS[self.name].automatic
        if rule is None or batch_size is None:
            raise SpecError(f"{self} depends on the batch size; pass batch_size= (per worker)")
        return rule(batch_size)


def parse_specs(text: str) -> tuple[NormSpec, ...]:
    """Read a comma-separated list of specs, each once.

    Raises:
        SpecError: If one cannot be read, is there twice, or the list is empty.

    Example:
        >>> parse_specs("bn,gn:8,bgn:auto")
        (NormSpec('bn'), NormSpec('gn:8'), NormSpec('bgn:auto'))
    """
    return parse_list(text, NormSpec.parse)


def parse_list(text: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """Read what has commas between, each by ``parse`` and each once.

    Raises:
        SpecError: If one cannot be read, is there twice, or the list is empty.
    """
    if not isinstance(text, str):
        raise SpecError(f"a list of specs is a text such as 'bn,gn:8'; {text!r} was given")
    specs = tuple(parse(part) for part in text.split(",") if part.strip())
    if not specs:
        raise SpecError(f"{text!r} names no norm; the norms are: {', '.join(METHODS)}")
    twice = [spec for spec, count in Counter(specs).items() if count > 1]
    if twice:
        raise SpecError(f"{shortened(text)!r} names {twice[0]} twice; name each norm once")
    return specs


def build(
    spec: str | NormSpec,
    num_features: int,
    *,
    batch_size: int | None = None,
    num_positions: int | None = None,
) -> nn.Module:
    """Build the layer that a spec names.

    Args:
        spec: A text such as ``"gn:32"`` or ``"bgn:auto"``, or a ``NormSpec``.
        num_features: Channels of the input.
        batch_size: Examples per worker in training; needed by ``auto``.
        num_positions: Product of the spatial sizes at the layer, for ``auto`` and ``max=K``.

    Returns:
        The layer, ready to use.

    Raises:
        SpecError: If the spec cannot be read, or needs the batch size.
        PartitionError: If its groups do not divide the channels.

    Example:
        >>> build("bgn:auto", 64, batch_size=8)
        BatchGroupNorm(64, num_groups=16, eps=1e-05, momentum=0.1, affine=True, \
track_running_stats=True, example_weight=0.0)
    """
    return NormSpec.parse(spec).build(
        num_features, batch_size=batch_size, num_positions=num_positions
    )


def _read(argument: str, recipe: Recipe, text: str) -> tuple[str, Value]:
    """Read one argument as (option, value); the option is empty for the method's own number."""
    key, equals, value = argument.partition("=")
    if not equals:
        return _read_unnamed(argument, recipe, text)
    if key == LIMIT and recipe.argument == "num_groups":
        return LIMIT, _whole_number(value, argument, text)
    if key == CHANNELS and recipe.argument == "num_groups" and not recipe.over_positions:
        return CHANNELS, _whole_number(value, argument, text)
    option = recipe.short.get(key, key)
    if option not in recipe.options():
        known = sorted([*recipe.options(), *recipe.short])
        raise SpecError(f"spec {text!r} sets {key!r}; its options are: {', '.join(known)}")
    if option == recipe.argument:
        return "", _whole_number(value, argument, text)
    return option, _value(value, str(recipe.options()[option].annotation), argument, text)


def _checked(name: str, value: Value) -> int:
    return require_count(name, value)  # type: ignore[arg-type] - which is what it checks


def _place(argument: tuple[str, Value]) -> tuple[int, str]:
    """Where an argument is written: what decides the groups first, then options by name."""
    key, _ = argument
    return (SIZES.index(key) if key in SIZES else len(SIZES)), key


def _read_unnamed(argument: str, recipe: Recipe, text: str) -> tuple[str, Value]:
    option = recipe.short.get(argument, argument)
    if _is_flag(option, recipe):
        return option, True
    if recipe.argument is None:
        raise SpecError(
            f"spec {text!r} has argument {argument!r}, but this norm takes no number; its options "
            f"are: {', '.join(f'{option}=' for option in recipe.options())}"
        )
    if argument == "auto":
        if recipe.automatic is None:
            known = [name for name, other in METHODS.items() if other.automatic]
            raise SpecError(f"spec {text!r} has no rule for auto; these have: {', '.join(known)}")
        return "", "auto"
    return "", _whole_number(argument, argument, text)


def _is_flag(option: str, recipe: Recipe) -> bool:
    """Whether this names an option that is true or false."""
    known = recipe.options().get(option)
    return known is not None and str(known.annotation) == "bool"


def _whole_number(value: str, argument: str, text: str) -> int:
    number = int(value) if re.fullmatch(r"[0-9]{1,100}", value) else 0
    if 0 < number <= MAX_NUMBER:
        return number
    raise SpecError(
        f"spec {text!r} has argument {argument!r}; it must be a whole number of at least 1 and at "
        f"most {MAX_NUMBER}, an option=value, or an option that is true or false"
    )


def _value(value: str, annotation: str, argument: str, text: str) -> Value:
    """Read a value by the annotation of its option."""
    constants: dict[str, Value] = {"true": True, "false": False, "none": None}
    if value in constants and (constants[value] is None) == ("None" in annotation):
        return constants[value]
    if annotation in WORDS:
        return _word(value, WORDS[annotation], argument, text)
    kind = annotation.split(" ", maxsplit=1)[0]
    if kind == "int":
        return _whole_number(value, argument, text)
    try:
        return {"float": float}[kind](value if value.isascii() and "_" not in value else "")
    except (KeyError, ValueError):
        raise SpecError(
            f"spec {text!r} has argument {argument!r}; the value must be of type {annotation}"
        ) from None


def _word(value: str, known: tuple[str, ...], argument: str, text: str) -> str:
    if value not in known:
        raise SpecError(
            f"spec {text!r} has argument {argument!r}; it is one of: {', '.join(known)}"
        )
    return value


def _print(key: str, value: Value) -> str:
    if value is True:
        return key
    shown = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return f"{key}={shown}" if key else shown
