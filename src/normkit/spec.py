"""Specs: norms as short texts such as ``"gn:32"``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from normkit.core.check import require_count
from normkit.core.partition import divisors, largest_divisor
from normkit.errors import PartitionError, SpecError
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

MAX_LENGTH = 400  # in characters

SIMPLE = ("int", "float", "bool", "str")  # types of options that take no word of a list
LIMIT, CHANNELS = "max", "channels"
SIZES = ("", LIMIT, CHANNELS)
"""Keys of the arguments that decide the number of groups, in the order of the canonical text.

The empty key is the method's own number, which is written without a name.
"""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm and its options, before the number of channels is known.

    The grammar is ``name(:argument)*(+ws)?``. An argument is one of:

    - a number: the number of groups, or of ``ghost`` the ghost batch size;
    - ``auto``: like ``max=K``, where K is what the paper recommends for the batch size;
    - ``max=K``: as many groups as possible, but at most K, that divide the layer's size;
    - ``channels=M``: groups of M channels each. With ``max=K``: at most K groups of at least M
      channels, or a single group if the layer has fewer than M channels;
    - a flag, such as ``micro``;
    - ``option=value``.

    A spec never contains a comma, so that commas can separate the specs of a list.

    Args:
        name: One of the names in ``METHODS``.
        arguments: Keys and values in canonical order: those that decide the number of groups first,
            then options by name. The key of an unnamed number is empty.
        standardize_weights: Whether the spec ends in ``+ws``, which asks for weight standardization
            of the convolution before the norm.

    Raises:
        SpecError: If the name is unknown.

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
        """Parse a spec; a ``NormSpec`` is returned unchanged.

        Raises:
            SpecError: If the text cannot be parsed; the error lists the known names or options.
        """
        if isinstance(text, NormSpec):
            return text
        if not isinstance(text, str):
            raise SpecError(f"{text!r} was given as a spec; it must be a string or a NormSpec")
        if len(text) > MAX_LENGTH:
            raise SpecError(
                f"a spec of {len(text)} characters was given, {text[:20]!r}...; it must have at "
                f"most {MAX_LENGTH}"
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
                f"spec {text!r} sets both the number of groups and the channels of a group; set "
                f"only one of them"
            )
        return cls(name, tuple(sorted(read.items(), key=_sort_key)), bool(suffixes))

    def __str__(self) -> str:
        texts = [_argument_text(key, value) for key, value in self.arguments]
        return ":".join([self.name, *texts]) + ("+ws" if self.standardize_weights else "")

    def __repr__(self) -> str:
        return f"NormSpec({str(self)!r})"

    @property
    def norm_alone(self) -> NormSpec:
        """The spec without ``+ws``, which is the spec of the norm layer itself."""
        return replace(self, standardize_weights=False)

    def resolve(
        self, num_features: int, *, batch_size: int | None = None, num_positions: int | None = None
    ) -> NormSpec:
        """Replace ``auto``, ``max=K`` and ``channels=M`` by a layer's number of groups.

        Args:
            num_features: Channels of the layer.
            batch_size: Examples per worker; ``auto`` needs it.
            num_positions: Product of the spatial sizes at the layer. Without it, the number of
                groups of ``bgn`` is a divisor of ``num_features``, which fits every spatial size.

        Raises:
            SpecError: If ``auto`` is given without a batch size, or a size is too large.
            OptionError: If a size is not a whole number of at least 1.
            PartitionError: If M does not divide the number of channels.
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
                f"{self} asks for weight standardization, which changes the layer before the norm, "
                f"not the norm; build the norm with {str(self.norm_alone)!r}, and call "
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
        """Return the number of groups of exactly, or else at least, so many channels."""
        size = _checked(CHANNELS, channels)
        if exact and num_features % size:
            raise PartitionError(
                f"{self} was given for a layer of {num_features} channels, which {size} does not "
                f"divide; choose one of {divisors(num_features)}, or also limit the number of "
                f"groups: {replace(self, arguments=((LIMIT, 32), *self.arguments))}"
            )
        return max(1, num_features // size)

    def _automatic(self, batch_size: int | None) -> int:
        """Return the largest number of groups that ``auto`` allows for a batch size."""
        rule = METHODS[self.name].automatic
        if rule is None or batch_size is None:
            raise SpecError(f"{self} depends on the batch size; pass batch_size= (per worker)")
        return rule(batch_size)


def parse_specs(text: str) -> tuple[NormSpec, ...]:
    """Parse a comma-separated list of specs.

    Raises:
        SpecError: If a spec cannot be parsed or is repeated, or if the list is empty.

    Example:
        >>> parse_specs("bn,gn:8,bgn:auto")
        (NormSpec('bn'), NormSpec('gn:8'), NormSpec('bgn:auto'))
    """
    return parse_list(text, NormSpec.parse)


def parse_list(text: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """Parse a comma-separated list, each element with ``parse``.

    Raises:
        SpecError: If an element cannot be parsed or is repeated, or if the list is empty.
    """
    if not isinstance(text, str):
        raise SpecError(f"{text!r} was given; a list of specs must be a string such as 'bn,gn:8'")
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
        spec: A string such as ``"gn:32"`` or ``"bgn:auto"``, or a ``NormSpec``.
        num_features: Channels of the input.
        batch_size: Examples per worker in training; ``auto`` needs it.
        num_positions: Product of the spatial sizes at the layer, for ``auto`` and ``max=K``.

    Returns:
        The layer.

    Raises:
        SpecError: If the spec cannot be parsed, or needs the batch size.
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
    """Parse one argument into a key and a value; the key of the method's own number is empty."""
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
    annotation = recipe.annotation(option)
    words = () if annotation.split(" ")[0] in SIMPLE else recipe.words(option)
    return option, _value(value, annotation, words, argument, text)


def _checked(name: str, value: Value) -> int:
    return require_count(name, value)  # type: ignore[arg-type] - it checks the type itself


def _sort_key(argument: tuple[str, Value]) -> tuple[int, str]:
    """Sort arguments that decide the number of groups first, then options by name."""
    key, _ = argument
    return (SIZES.index(key) if key in SIZES else len(SIZES)), key


def _read_unnamed(argument: str, recipe: Recipe, text: str) -> tuple[str, Value]:
    option = recipe.short.get(argument, argument)
    if option in recipe.options() and recipe.annotation(option) == "bool":
        return option, True
    if recipe.argument is None:
        raise SpecError(
            f"spec {text!r} has argument {argument!r}, but this norm takes no number; its options "
            f"are: {', '.join(f'{option}=' for option in recipe.options())}"
        )
    if argument == "auto":
        if recipe.automatic is None:
            known = [name for name, other in METHODS.items() if other.automatic]
            raise SpecError(
                f"spec {text!r} uses auto, but only these norms have a rule for it: "
                f"{', '.join(known)}; give a number instead"
            )
        return "", "auto"
    return "", _whole_number(argument, argument, text)


def _whole_number(value: str, argument: str, text: str) -> int:
    number = int(value) if re.fullmatch(r"[0-9]{1,100}", value) else 0
    if 0 < number <= MAX_NUMBER:
        return number
    raise SpecError(
        f"spec {text!r} has argument {argument!r}; it must be a whole number of at least 1 and at "
        f"most {MAX_NUMBER}, an option=value, or a flag"
    )


def _value(value: str, annotation: str, words: tuple[str, ...], argument: str, text: str) -> Value:
    """Parse a value as the annotation of its option says."""
    constants: dict[str, Value] = {"true": True, "false": False, "none": None}
    if value in constants and (constants[value] is None) == ("None" in annotation):
        return constants[value]
    if words:
        if value in words:
            return value
        raise SpecError(
            f"spec {text!r} has argument {argument!r}; the value must be one of: {', '.join(words)}"
        )
    kind = annotation.split(" ", maxsplit=1)[0]
    if kind == "str":
        return value
    if kind == "int":
        return _whole_number(value, argument, text)
    # float() also accepts underscores and other alphabets' digits, which a spec must not have.
    if kind == "float" and value.isascii() and "_" not in value:
        with suppress(ValueError):
            return float(value)
    raise SpecError(
        f"spec {text!r} has argument {argument!r}; the value must be of type {annotation}"
    )


def _argument_text(key: str, value: Value) -> str:
    if value is True:
        return key
    shown = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return f"{key}={shown}" if key else shown
