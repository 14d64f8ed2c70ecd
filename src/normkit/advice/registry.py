"""The checks, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from normkit.advice.finding import Finding
from normkit.advice.situation import Situation
from normkit.errors import OptionError

Check = Callable[[Situation], Iterator[Finding]]

CHECKS: dict[str, Check] = {}
"""Every check that ``validate`` makes."""


def check(name: str) -> Callable[[Check], Check]:
    """Register a check.

    Args:
        name: What its findings are called.

    Raises:
        OptionError: If there is a check of that name.
    """

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise OptionError(f"check {name!r} is there already: {CHECKS[name].__name__}")
        CHECKS[name] = function
        return function

    return register
