"""The registry of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from normkit.advice.finding import Finding
from normkit.advice.situation import Situation
from normkit.errors import OptionError

Check = Callable[[Situation], Iterator[Finding]]

CHECKS: dict[str, Check] = {}
"""All checks that ``validate`` runs, by name."""


def check(name: str) -> Callable[[Check], Check]:
    """Register a check.

    Args:
        name: Name of the check, which its findings carry.

    Raises:
        OptionError: If there is a check of that name already.
    """

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise OptionError(
                f"check {name!r} exists already: {CHECKS[name].__name__}; choose another name"
            )
        CHECKS[name] = function
        return function

    return register
