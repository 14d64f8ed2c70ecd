"""What the code of a class does with ``self``, read from its bytecode: no source is needed."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

Path = tuple[str, ...]
"""Names from ``self`` on: ``("bn", "weight")`` is ``self.bn.weight``."""

EACH = "*"
"""Stands in a path for every element that a loop runs over."""
CLASS = "__class__"
LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
SUBSCRIPT = ("BINARY_OP", 26)  # what BINARY_SUBSCR is since Python 3.14
PASSING = ("FOR_ITER", "CACHE", "NOP", "COPY_FREE_VARS", "PUSH_NULL", "SWAP", "COPY")
"""Instructions that leave the value on top of the stack what it is, as far as paths go."""


@cache
def methods_of(kind: type) -> dict[str, CodeType]:
    """Code of the methods and properties of a class by name; ``nn.Module``'s own do not count."""
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
    """Names that instances of a class have by its own code: what it defines, sets or reads."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base not in nn.Module.__mro__:
            found |= vars(base).keys() | vars(base).get("__annotations__", {}).keys()
            for code in methods_of(base).values():
                found.update(path[0] for path in paths(code) if path)
                found.update(_texts(code))
    return frozenset(found)


@cache
def read_by_forward(kind: type) -> frozenset[Path]:
    """Paths that the forward of a class, and what it calls of its own methods, mentions."""
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
    """Paths from the first argument that a function mentions, in nested functions too.

    ``isinstance(self.bn, ...)`` and ``type(self.bn)`` mention ``("bn", "__class__")``, and
    ``getattr(self.bn, "weight")`` mentions ``("bn", "weight")``.
    """
    me = code.co_varnames[0] if code.co_argcount else ""
    return frozenset(_paths(code, {me: ()}))


def _paths(code: CodeType, known: dict[str, Path]) -> Iterator[Path]:
    """Follow the value on top of the stack from one instruction to the next."""
    reader = _Reader(dict(known))
    for instruction in dis.get_instructions(code):
        yield from reader.read(instruction.opname, instruction.argval)
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for each in inner:
        yield from _paths(each, {n: p for n, p in reader.known.items() if n in each.co_freevars})


class _Reader:
    """The value on top of the stack, if it is a path, and the local names of paths."""

    def __init__(self, known: dict[str, Path]) -> None:
        self.known = known
        self._path: Path | None = None
        self._index: object = None
        self._asked: object = None

    def read(self, name: str, value: Any) -> Iterator[Path]:  # noqa: ANN401 - what dis gives
        """Take one instruction; give the paths that it mentions."""
        before, self._path = self._path, None
        if name.startswith(LOADS):
            self._path = self.known.get(_last(value))
        elif name.startswith("STORE_FAST") or name == "STORE_DEREF":
            self._store(before, value)
        elif name == "LOAD_GLOBAL" or name.startswith("CALL"):
            self._asked = value
        elif before is not None:
            self._go_on(before, name, value)
        if self._path and self._path != before:
            yield self._path
            if self._asked in ("isinstance", "type"):
                yield (*self._path, CLASS)

    def _go_on(self, before: Path, name: str, value: Any) -> None:  # noqa: ANN401
        if name in ATTRIBUTES:
            self._path = (*before, value)
        elif name == "LOAD_CONST" and self._asked in ("getattr", "hasattr"):
            self._path = (*before, str(value))
        elif name == "LOAD_CONST":
            self._path, self._index = before, value
        elif name == "BINARY_SUBSCR" or (name, value) == SUBSCRIPT:
            self._path = (*before, str(self._index))
        elif name == "GET_ITER":
            self._path = (*before, EACH)
        elif name in PASSING:
            self._path = before

    def _store(self, before: Path | None, value: Any) -> None:  # noqa: ANN401
        stored, after = value if isinstance(value, tuple) else (value, None)
        if before is None:
            self.known.pop(stored, None)
        else:
            self.known[stored] = before
        self._path = self.known.get(after) if after is not None else None


def _last(value: Any) -> str:  # noqa: ANN401
    return value[-1] if isinstance(value, tuple) else value


def _texts(constant: object) -> Iterator[str]:
    """Texts in code that may be names: parameters and buffers are registered by those."""
    if isinstance(constant, CodeType):
        constant = constant.co_consts
    if isinstance(constant, tuple):
        yield from (name for inner in constant for name in _texts(inner))
    elif isinstance(constant, str) and constant.isidentifier():
        yield constant
