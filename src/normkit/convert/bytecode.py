"""Finding which attributes of ``self`` the methods of a class use.

The answer is read from the bytecode, because the source may not be available.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

Path = tuple[str, ...]
"""Attribute names, starting at ``self``: ``("bn", "weight")`` is ``self.bn.weight``."""

EACH = "*"
"""Element of a path that stands for every element that a loop iterates over."""
CLASS = "__class__"
LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
SUBSCRIPT = ("BINARY_OP", 26)  # replaces BINARY_SUBSCR from Python 3.14 on
NEUTRAL = ("FOR_ITER", "CACHE", "NOP", "COPY_FREE_VARS", "PUSH_NULL", "SWAP", "COPY")
"""Instructions after which the value on top of the stack has the same path."""


@cache
def methods_of(kind: type) -> dict[str, CodeType]:
    """Return the code of the methods and properties of a class, except those of ``nn.Module``."""
    found: dict[str, CodeType] = {}
    for base in kind.__mro__:
        if base not in nn.Module.__mro__:
            for name, value in vars(base).items():
                function = getattr(value, "fget", value)
                if isinstance(function, FunctionType):
                    found.setdefault(name, function.__code__)
    return found


@cache
def own_names(kind: type) -> frozenset[str]:
    """Return the attribute names that the code of a class defines, sets or reads."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base not in nn.Module.__mro__:
            found |= vars(base).keys() | vars(base).get("__annotations__", {}).keys()
            for code in methods_of(base).values():
                found.update(path[0] for path in paths(code) if path)
                found.update(_identifiers(code))
    return frozenset(found)


@cache
def read_by_forward(kind: type) -> frozenset[Path]:
    """Return the paths that the forward of a class mentions, or a method that it calls does."""
    methods, found = methods_of(kind), set[Path]()
    open_, seen = ["forward"], set[str]()
    while open_:
        name = open_.pop()
        if name in methods and name not in seen:
            seen.add(name)
            mentioned = paths(methods[name])
            found |= mentioned
            open_ += [path[0] for path in mentioned if len(path) == 1]
    return frozenset(found)


@cache
def paths(code: CodeType) -> frozenset[Path]:
    """Return the paths from a function's first argument that its code mentions.

    Nested functions are included.

    ``isinstance(self.bn, ...)`` and ``type(self.bn)`` mention ``("bn", "__class__")``, and
    ``getattr(self.bn, "weight")`` mentions ``("bn", "weight")``.
    """
    first_argument = code.co_varnames[0] if code.co_argcount else ""
    return frozenset(_paths(code, {first_argument: ()}))


def _paths(code: CodeType, known: dict[str, Path]) -> Iterator[Path]:
    """Track the value on top of the stack from one instruction to the next."""
    reader = _Reader(dict(known))
    for instruction in dis.get_instructions(code):
        yield from reader.read(instruction.opname, instruction.argval)
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for each in inner:
        yield from _paths(each, {n: p for n, p in reader.known.items() if n in each.co_freevars})


class _Reader:
    """Tracks the path of the value on top of the stack, and the paths of local variables."""

    def __init__(self, known: dict[str, Path]) -> None:
        self.known = known
        self._path: Path | None = None
        self._index: object = None
        self._function: object = None  # the last function that was loaded, such as "getattr"

    def read(self, name: str, value: Any) -> Iterator[Path]:
        """Process one instruction; yield the paths that it mentions."""
        before, self._path = self._path, None
        if name.startswith(LOADS):
            # LOAD_FAST_LOAD_FAST has two names, of which the second ends up on top.
            self._path = self.known.get(value[-1] if isinstance(value, tuple) else value)
        elif name.startswith("STORE_FAST") or name == "STORE_DEREF":
            self._store(before, value)
        elif name == "LOAD_GLOBAL" or name.startswith("CALL"):
            self._function = value
        elif before is not None:
            self._extend(before, name, value)
        if self._path and self._path != before:
            yield self._path
            if self._function in ("isinstance", "type"):
                yield (*self._path, CLASS)

    def _extend(self, before: Path, name: str, value: Any) -> None:
        """Set the new path after an instruction that uses the value with the path ``before``."""
        if name in ATTRIBUTES:
            self._path = (*before, value)
        elif name == "LOAD_CONST" and self._function in ("getattr", "hasattr"):
            self._path = (*before, str(value))
        elif name == "LOAD_CONST":
            self._path, self._index = before, value
        elif name == "BINARY_SUBSCR" or (name, value) == SUBSCRIPT:
            self._path = (*before, str(self._index))
        elif name == "GET_ITER":
            self._path = (*before, EACH)
        elif name in NEUTRAL:
            self._path = before

    def _store(self, before: Path | None, value: Any) -> None:
        """Assign the value with the path ``before`` to a local variable."""
        # STORE_FAST_LOAD_FAST has two names: it stores one variable and then loads another.
        stored, after = value if isinstance(value, tuple) else (value, None)
        if before is None:
            self.known.pop(stored, None)
        else:
            self.known[stored] = before
        self._path = self.known.get(after) if after is not None else None


def _identifiers(constant: object) -> Iterator[str]:
    """Yield the strings in code that may be attribute names, as in ``register_buffer("mean")``."""
    if isinstance(constant, CodeType):
        constant = constant.co_consts
    if isinstance(constant, tuple):
        yield from (name for inner in constant for name in _identifiers(inner))
    elif isinstance(constant, str) and constant.isidentifier():
        yield constant
