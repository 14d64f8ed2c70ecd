"""How arms are written: the names of placements, and a norm beside them."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from normkit import NormSpec
from normkit.convert.placement.batch_free import batch_free
from normkit.errors import SpecError
from normkit.recipes import METHODS

NONE, FROZEN, IBN_A, IBN_B, XBN, GNBN = "none", "frozen-bn", "ibn-a", "ibn-b", "xbn", "gnbn"
FOUR_THINGS = "four-things"

ARMS: Mapping[str, str] = MappingProxyType(
    {
        NONE: "no norm: each one is removed, and biases stay as they are",
        FROZEN: "bn with running statistics that stand still; scale and shift learn",
        FOUR_THINGS: "gn, gbgn or ghost by the batch size, as in nk.four_things",
        IBN_A: "IBN-Net-a: ibn first in each residual block but those of the last stage, else bn",
        IBN_B: "IBN-Net-b: instance norm in the stem and after two sums, else bn",
        "xbn/NORM": "XBN: this norm second in each residual block, else bn",
        "xbn-pP/NORM": "the same with the norm at position P, from 1",
        "xbn-dK/NORM": "the same in every K-th block; xbn-pP-dK/NORM is both",
        "gnbn/NORM": "GNBN: this norm at odd positions of the stack, else bn",
        "+ws": "after any of these or a norm: weight standardization before every norm",
        "+ws:center": "the same, which only subtracts the mean of a filter",
        "+ws:scale": "the same, which only divides by its standard deviation",
        "+wn": "weight normalization before every norm",
        "+cwn": "centred weight normalization before every norm",
    }
)
"""What an arm can be besides a norm throughout, in a line each."""


def read_alone(body: str, text: str) -> tuple[str, NormSpec | None]:
    """Read what has no slash: a norm, or a placement that says the norm itself."""
    name, colon, options = body.partition(":")
    if name in {IBN_A, "ibn"}:
        return IBN_A, NormSpec.parse(f"ibn{colon}{options}")
    if name in {NONE, FROZEN, FOUR_THINGS, IBN_B}:
        if colon:
            raise SpecError(f"arm {text!r} gives {name} options, but it has none; write {name}")
        return name, None
    if name == GNBN or re.fullmatch(rf"{XBN}(-.*)?", name):
        raise SpecError(f"arm {text!r} says no norm to place; write it after a /: {name}/gn:4")
    try:
        return "", NormSpec.parse(body)
    except SpecError as error:
        if name in METHODS:
            raise
        others = ", ".join(arm for arm in ARMS if not arm.startswith("+"))
        raise SpecError(
            f"{error} (besides norms there are: {others}; --own-norms names norms of your own)"
        ) from error


def read_placed(body: str, text: str) -> tuple[str, NormSpec]:
    """Read a placement and the norm after the slash."""
    placement, _, norm = body.partition("/")
    if placement != GNBN:
        try:
            position, every = position_and_every(placement)
        except ValueError as error:
            raise SpecError(
                f"arm {text!r} has {placement!r} before the /; it is {XBN}, {XBN}-p1 (position), "
                f"{XBN}-d2 (every second block), {XBN}-p1-d2 or {GNBN}"
            ) from error
        placement = XBN + (f"-p{position}" if position != 2 else "")
        placement += f"-d{every}" if every != 1 else ""
    try:
        return placement, batch_free(norm)
    except SpecError as error:
        raise SpecError(f"arm {text!r} cannot place its norm: {error}") from error


def position_and_every(placement: str) -> tuple[int, int]:
    """Position and distance of ``xbn-p1-d2``: 2 and 1 where they are not written.

    Raises:
        ValueError: If it is no such placement.
    """
    head, *parts = placement.split("-")
    numbers = {part[:1]: part[1:] for part in parts}
    known = len(numbers) == len(parts) and numbers.keys() <= {"p", "d"} and head == XBN
    if known and all(re.fullmatch("[1-9][0-9]{0,3}", number) for number in numbers.values()):
        return int(numbers.get("p", 2)), int(numbers.get("d", 1))
    raise ValueError(placement)
