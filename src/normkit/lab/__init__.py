"""Experiments: one network trained under several norms, and what came out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normkit.lab.experiment import Result, compare
    from normkit.lab.recipe import Recipe

_HOMES = {
    "compare": "normkit.lab.experiment",
    "Result": "normkit.lab.experiment",
    "Recipe": "normkit.lab.recipe",
}

__all__ = ["Recipe", "Result", "compare"]


def __getattr__(name: str) -> Any:
    """Import what is asked for; the rest of the lab is not needed for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from normkit.lab.extra import lab_packages

    with lab_packages():
        return getattr(import_module(_HOMES[name]), name)
