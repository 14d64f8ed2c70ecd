"""What a conversion did to a model's structure, as plain values that JSON takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from normkit.errors import OptionError
from normkit.text import shortened

FORMAT = 1
FORMAT_KEY, NORMS = "format", "norms"
LISTS = ("after_sum", "standardized", "preserved")
WAY_OUT = "pass what recipe() of a conversion returned, or the JSON text of it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRecipe:
    """The changes of one conversion, by the names of modules.

    Args:
        norms: Resolved specs of the norms that were replaced.
        after_sum: Residual blocks that got a norm after their sum.
        standardized: Layers whose weights were standardised.
        preserved: Those of them that have a learned gain and offset of each filter.
    """

    norms: Mapping[str, str] = field(default_factory=dict)
    after_sum: tuple[str, ...] = ()
    standardized: tuple[str, ...] = ()
    preserved: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as a dict that ``json.dumps`` takes; empty lists are left out."""
        lists = {name: list(getattr(self, name)) for name in LISTS if getattr(self, name)}
        return {FORMAT_KEY: FORMAT, NORMS: dict(self.norms), **lists}

    @classmethod
    def read(cls, given: Mapping[str, Any] | str) -> Self:
        """Read what ``as_dict`` wrote, or the JSON text of it.

        Raises:
            OptionError: If it is no such recipe, or of a later format.
        """
        values = _from_text(given) if isinstance(given, str) else given
        if not isinstance(values, Mapping) or FORMAT_KEY not in values:
            raise OptionError(f"{shortened(repr(given))} was given as a recipe; {WAY_OUT}")
        if values[FORMAT_KEY] != FORMAT:
            raise OptionError(
                f"a recipe of format {values[FORMAT_KEY]!r} was given; this version of normkit "
                f"reads format {FORMAT}"
            )
        unknown = sorted(set(values) - {FORMAT_KEY, NORMS, *LISTS}, key=str)
        norms = values.get(NORMS, {})
        lists = {name: values.get(name, ()) for name in LISTS}
        is_map = isinstance(norms, Mapping) and _are_texts([*norms, *norms.values()])
        if unknown or not is_map or not all(map(_is_list_of_texts, lists.values())):
            raise OptionError(
                f"a recipe was given that has other parts than names and specs under {NORMS!r} and "
                f"lists of names under {', '.join(map(repr, LISTS))}; {WAY_OUT}"
            )
        return cls(norms=dict(norms), **{name: tuple(names) for name, names in lists.items()})


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise OptionError(
            f"{shortened(text)!r} was given as a recipe, which is not JSON; {WAY_OUT}"
        ) from error


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and _are_texts(value)


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
