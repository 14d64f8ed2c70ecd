"""Rewriting a module's forward: a norm's call replaces the sum and the activation after it."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from torch import fx, nn

from normkit.errors import ConversionError
from normkit.fusing.sites import Own, Site, follow, sites


class _ModuleName(NamedTuple):
    """The name of an imported module that a forward uses; modules themselves cannot be pickled."""

    name: str


class Code(NamedTuple):
    """The source of a forward and the names that it uses."""

    source: str
    names: tuple[tuple[str, Any], ...]

    def compiled(self) -> Callable[..., Any]:
        """The function ``forward``."""
        known: dict[str, Any] = {
            key: import_module(value.name) if isinstance(value, _ModuleName) else value
            for key, value in self.names
        }
        exec(compile(self.source, "<normkit: fused forward>", "exec"), known)
        return known["forward"]


class _Rewritten(nn.Module):
    """A module whose class is made at run time, as a subclass of its own class."""

    base: type[nn.Module]
    code: Code

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _empty, (self.base, self.code), self.__dict__


@cache
def _class(base: type[nn.Module], code: Code) -> type[_Rewritten]:
    attributes = {"base": base, "code": code, "forward": code.compiled(), "__module__": __name__}
    return type(base.__name__, (_Rewritten, base), attributes)


def _empty(base: type[nn.Module], code: Code) -> _Rewritten:
    """Make a module without state, for copying and unpickling."""
    kind = _class(base, code)
    new: Callable[[type[_Rewritten]], _Rewritten] = object.__new__
    return new(kind)


def rewritten(own: Own, norms: Collection[str]) -> type[nn.Module]:
    """Make a class for a module, whose forward lets these norms add and activate.

    Raises:
        ConversionError: If ``torch.fx`` can no longer trace the forward.
    """
    again = follow(own.name, own.module)
    if again is None or again.graph is None:
        raise ConversionError(
            f"torch.fx traced the forward of {own.name or 'the model'} when it was planned, and "
            f"cannot trace it any more; do not change the model while its activations are fused"
        )
    found = [s for s in sites(again) if isinstance(s, Site) and s.norm.target in norms]
    for site in found:
        _join(again.graph, site)
    again.graph.lint()
    made = again.graph.python_code("self")
    names = tuple(
        (key, _ModuleName(value.__name__) if isinstance(value, types.ModuleType) else value)
        for key, value in made.globals.items()
    )
    kind = type(own.module)
    base = kind.base if issubclass(kind, _Rewritten) else kind
    return _class(base, Code(made.src, names))


def _join(graph: fx.Graph, site: Site) -> None:
    """Move the norm's call to the place of the activation, and pass it the residual."""
    mine = {site.norm, *site.between}
    inputs = [a for node in site.between for a in node.args if isinstance(a, fx.Node)]
    added = [a for a in inputs if a not in mine]
    named: dict[str, Any] = {"residual": added[0]} if added else {}
    with graph.inserting_before(site.end):
        joined = graph.create_node("call_module", site.norm.target, site.norm.args, named)
    site.end.replace_all_uses_with(joined)
    for node in (site.end, *reversed(site.between), site.norm):
        graph.erase_node(node)
