"""Norms of a user's own under names of theirs, in every process that trains with them."""

from collections.abc import Iterable
from typing import Any

from normkit.errors import SpecError
from normkit.lab.arms import Arm
from normkit.lab.user_code import load_function, name_of
from normkit.recipes import BUILT_IN, METHODS, register_norm


def reference_in(text: str) -> str:
    """The second part of ``NAME=FILE.py:CLASS``.

    Raises:
        SpecError: If it is not written like this.
    """
    name, equals, reference = text.partition("=")
    if not (name and equals and reference):
        raise SpecError(
            f"--own-norms was given {text!r}; it must be a name, = and a class in a Python file, "
            f"as in pair=my.py:PairNorm, or several with commas between"
        )
    return reference


def register_norms(given: Iterable[str]) -> None:
    """Register what ``--own-norms`` names, so that arms can be read.

    Args:
        given: Texts ``NAME=FILE.py:CLASS``.

    Raises:
        SpecError: If a file or a class is not there, or cannot be a norm of that name.
    """
    for text in given:
        reference = reference_in(text)
        layer: Any = load_function(reference, "--own-norms")
        register_norm(text.partition("=")[0], layer)


def norms_in_use(arms: Iterable[Arm]) -> tuple[str, ...]:
    """What ``--own-norms`` would be for arms whose norms this process has registered."""
    names = dict.fromkeys(arm.norm.name for arm in arms if arm.norm is not None)
    own = [name for name in names if name not in BUILT_IN]
    return tuple(f"{name}={name_of(METHODS[name].layer, 'norm')}" for name in own)
