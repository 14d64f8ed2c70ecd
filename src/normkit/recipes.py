"""The norms that a spec can name, and the layer of each."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args, get_origin, get_type_hints

from torch import nn

from normkit.core.check import require_count
from normkit.errors import SpecError
from normkit.layers import over_batch, over_example
from normkit.layers.base import NormLayer
from normkit.layers.batch_channel import BatchChannelNorm
from normkit.layers.group_plus import GroupNormPlus
from normkit.layers.instance_batch import InstanceBatchNorm
from normkit.layers.switchable import SwitchableNorm
from normkit.layers.whitening import GroupWhitening

MAX_NUMBER = 2**24
"""Largest number of groups, examples or channels; buffers of this size still fit in memory."""
MAX_BITS = 300
"""Largest size of a number that error texts print; Python refuses to print thousands of digits."""

RECOMMENDED_BGN_GROUPS: Mapping[int, int] = MappingProxyType(
    {128: 512, 96: 256, 64: 256, 32: 128, 16: 64, 8: 16, 4: 2, 2: 1, 1: 1}
)
"""Groups for BGN by examples per worker: Zhou et al., Batch Group Normalization, table 2.

For 96 examples the paper takes 256 groups in DARTS, "following" that table. The entry for 1 is
ours. The paper's groups for other tasks do not follow the table; ``advice/evidence.py`` lists them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to build the layer of one name.

    Args:
        layer: The layer's class.
        argument: The option that an unnamed number in a spec sets; None if there is none.
        short: Short names of options.
        over_positions: Whether the number of groups divides ``C * positions`` rather than ``C``.
        automatic: Returns the largest number of groups that ``auto`` allows for a batch size.
    """

    layer: Callable[..., nn.Module]
    argument: str | None = None
    short: Mapping[str, str] = field(default_factory=dict)
    over_positions: bool = False
    automatic: Callable[[int], int] | None = None

    def options(self) -> Mapping[str, inspect.Parameter]:
        """Return the options of the layer's constructor that a spec can set, by name."""
        parameters = inspect.signature(self.layer).parameters
        hidden = ("num_features", "process_group", "device", "dtype")
        return {name: p for name, p in parameters.items() if name not in hidden}

    def annotation(self, option: str) -> str:
        """The type of an option as text: its annotation, or without one its default's type."""
        parameter = self.options()[option]
        if isinstance(parameter.annotation, str):
            return parameter.annotation
        if parameter.annotation is parameter.empty:
            return type(parameter.default).__name__
        return inspect.formatannotation(parameter.annotation)

    def words(self, option: str) -> tuple[str, ...]:
        """What an option may be whose constructor annotates it by a ``Literal`` of words."""
        kinds = self.layer.__mro__ if isinstance(self.layer, type) else ()
        for init in (vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)):
            if option in inspect.signature(init).parameters:
                with suppress(Exception):  # names that only a type checker knows
                    hint = get_type_hints(init)[option]
                    found = (hint, *get_args(hint))  # the type, or those of a union with None
                    return next((get_args(h) for h in found if get_origin(h) is Literal), ())
                break
        return ()


def require_size(name: str, value: int, at_most: int = MAX_NUMBER) -> int:
    """Refuse a value that is not a whole number from 1 to ``at_most``.

    Raises:
        OptionError: If it is not a whole number, or below 1.
        SpecError: If it is above ``at_most``.
    """
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise SpecError(
            f"a number of {value.bit_length()} bits was given as {name}; it must be at most "
            f"{at_most}"
        )
    if require_count(name, value) > at_most:
        raise SpecError(f"{name}={value} was given; it must be at most {at_most}")
    return int(value)


def recommended_bgn_groups(batch_size: int) -> int:
    """Return the paper's number of groups for BGN, at the batch size that is nearest in log2.

    Args:
        batch_size: Examples per worker.

    Raises:
        OptionError: If the batch size is not a whole number of at least 1.
        SpecError: If the batch size is 2**63 or more.
    """
    size = require_size("batch_size", batch_size, at_most=2**63 - 1)
    nearest = min(RECOMMENDED_BGN_GROUPS, key=lambda known: abs(math.log2(size / known)))
    return RECOMMENDED_BGN_GROUPS[nearest]


_METHODS: dict[str, Recipe] = {
    "bn": Recipe(layer=over_batch.BatchNorm),
    "in": Recipe(layer=over_example.InstanceNorm),
    "ln": Recipe(layer=over_example.LayerNorm),
    "gn": Recipe(layer=over_example.GroupNorm, argument="num_groups"),
    "pn": Recipe(layer=over_example.PositionalNorm),
    "bgn": Recipe(
        layer=over_batch.BatchGroupNorm,
        argument="num_groups",
        over_positions=True,
        automatic=recommended_bgn_groups,
    ),
    "ghost": Recipe(layer=over_batch.GhostBatchNorm, argument="ghost_batch_size"),
    "gbgn": Recipe(
        layer=over_batch.GeneralBatchGroupNorm,
        argument="num_groups",
        short={"examples": "examples_per_group"},
    ),
    "gnplus": Recipe(layer=GroupNormPlus, argument="num_groups"),
    "bcn": Recipe(
        layer=BatchChannelNorm,
        argument="num_groups",
        short={"micro": "micro_batch", "rate": "update_rate"},
    ),
    "sn": Recipe(layer=SwitchableNorm),
    "gw": Recipe(layer=GroupWhitening, argument="num_groups"),
    "ibn": Recipe(layer=InstanceBatchNorm),
}
METHODS: Mapping[str, Recipe] = MappingProxyType(_METHODS)
"""Every norm that a spec can name: normkit's, then those of ``register_norm``."""

BUILT_IN = tuple(_METHODS)
"""The names of normkit's norms."""
_NOT_FOR_NORMS = ("none", "xbn", "gnbn")
"""Names that mean something else where norms are compared."""


def register_norm(name: str, layer: type[NormLayer]) -> None:
    """Give a layer of your own a name that specs, and with them all tools, understand.

    After it ``nk.build``, ``nk.convert_norm``, ``nk.place_xbn_`` and the other tools take
    ``"name:option=value"``. If the class derives from one of normkit's layers, an unnamed number,
    short names and ``auto`` mean what they mean there; else a number is ``num_groups``, where there
    is such an option. A model that has the layer can be converted to another norm.

    The name is known to this process. For ``normkit compare`` write
    ``--own-norms NAME=FILE.py:CLASS``.

    Args:
        name: A lower-case letter, then lower-case letters, digits and underscores.
        layer: Your class. It derives from one of normkit's layers or from their base classes in
            ``normkit.layers.base``; its constructor takes the number of channels first.

    Raises:
        SpecError: If the name cannot be used or belongs to another norm, or the class is not a
            layer. To register a changed class of the same name again replaces it.

    Example:
        >>> import normkit as nk
        >>> from normkit.core.partition import Partition
        >>> class PairNorm(nk.GroupNorm):
        ...     @property
        ...     def partition(self):
        ...         return Partition(num_groups=self.num_groups, examples_per_group=2)
        >>> nk.register_norm("pair", PairNorm)
        >>> nk.build("pair:4:eps=0.001", 16)
        PairNorm(16, num_groups=4, eps=0.001, momentum=0.1, affine=True, \
track_running_stats=False, example_weight=1.0)
    """
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]{0,39}", name):
        raise SpecError(
            f"{name!r} was given as the name of a norm; it must be a lower-case letter and then "
            f"at most 39 more, digits or underscores"
        )
    if not isinstance(layer, type) or not issubclass(layer, NormLayer) or inspect.isabstract(layer):
        raise SpecError(
            f"{getattr(layer, '__name__', layer)!r} was given as norm {name!r}; it must be a class "
            f"that derives from one of normkit's layers, such as nk.GroupNorm, or from a base "
            f"class in normkit.layers.base, and defines all that is abstract there"
        )
    known = _METHODS.get(name)
    is_again = known is not None and getattr(known.layer, "__qualname__", "") == layer.__qualname__
    if name in BUILT_IN or name in _NOT_FOR_NORMS or (known is not None and not is_again):
        raise SpecError(
            f"{name!r} was given as the name of {layer.__name__}, but it means something else "
            f"already; choose another name than: {', '.join([*METHODS, *_NOT_FOR_NORMS])}"
        )
    _METHODS[name] = _derived(layer)


def _derived(layer: type[NormLayer]) -> Recipe:
    """How to build a user's layer: as the layer of normkit's that it derives from."""
    for kind in layer.__mro__:
        for name in BUILT_IN:
            if _METHODS[name].layer is kind:
                return replace(_METHODS[name], layer=layer)
    made = Recipe(layer=layer)
    return replace(made, argument="num_groups") if "num_groups" in made.options() else made


def recipe_of(name: str, text: str) -> Recipe:
    """Return the recipe of a name.

    Args:
        name: The name in a spec.
        text: The whole spec, for the error text.

    Raises:
        SpecError: If there is no such norm; the error lists all names and suggests one.
    """
    if name not in METHODS:
        raise SpecError(
            f"spec {text!r} names norm {name!r}; the norms are: "
            f"{', '.join(METHODS)}{_suggestion(name)}"
        )
    return METHODS[name]


def _suggestion(name: str) -> str:
    """Suggest the spec that a name such as ``gn8``, ``GN-8`` or ``GroupNorm`` probably means."""
    from difflib import get_close_matches  # slow import

    read = re.fullmatch(r"([a-z_ ]+)[^a-z0-9]*(\d{0,9})d?", name.lower())
    if read is None:
        return ""
    known = {key: key for key in METHODS}
    known |= {recipe.layer.__name__.lower(): key for key, recipe in METHODS.items()}
    close = get_close_matches(re.sub("[_ ]", "", read[1]), known, n=1)
    if not close:
        return ""
    found = known[close[0]]
    number = f":{read[2]}" if read[2] and METHODS[found].argument else ""
    return f"; did you mean {found}{number}?"
