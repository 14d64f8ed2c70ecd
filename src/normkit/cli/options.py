"""How ``--help`` shows the options of a command, which tyro reads off a dataclass."""

import ast
import dataclasses
import inspect
import textwrap
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro

Json = Annotated[
    bool, tyro.conf.arg(name="json", help_behavior_hint=""), tyro.conf.FlagCreatePairsOff
]
"""``--json`` of every command that has it."""


@cache
def tidied(command: type) -> type:
    """Say of each option what it takes and means, without tyro's words about None.

    An option that was not given is None, and its docstring says what then happens; tyro would add
    that the default is None, and that the option takes ``{None}|INT``.
    """
    for kind in command.__mro__:
        hints = vars(kind).get("__annotations__", {})
        said = _docstrings(kind) if dataclasses.is_dataclass(kind) else {}
        for name in said.keys() & hints.keys():
            if getattr(kind, name, ...) in {None, False} and not _is_shown_already(hints[name]):
                shown = {
                    "help": said[name],
                    "help_behavior_hint": "",
                    "metavar": _taken(hints[name]),
                }
                hints[name] = Annotated[hints[name], tyro.conf.arg(**shown)]
    return command


def _is_shown_already(hint: Any) -> bool:
    return any(type(mark) is type(tyro.conf.arg(name="x")) for mark in get_args(hint)[1:])


def _docstrings(kind: type) -> dict[str, str]:
    """The docstring below each field of a class, as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = getattr(below.value, "value", None)
            if isinstance(text, str) and isinstance(field.target, ast.Name):
                found[field.target.id] = " ".join(text.split())
    return found


def _taken(hint: Any) -> str | None:
    """What an option takes: ``INT``, or the words among which it chooses; None for a flag."""
    if get_origin(hint) is Annotated:
        return _taken(get_args(hint)[0])
    if get_origin(hint) in {Union, UnionType}:
        (one,) = (each for each in get_args(hint) if each is not NoneType)
        return _taken(one) if one is not bool else "{True,False}"
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, get_args(hint)))}}}"
    return None if hint is bool else hint.__name__.upper()
