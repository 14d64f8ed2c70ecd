"""Finding the attributes of norms that the forwards of other modules read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from normkit.convert.bytecode import CLASS, EACH, Path, read_by_forward
from normkit.errors import ConversionError
from normkit.tracing.kinds import is_norm

Reads = Mapping[nn.Module, Mapping[str, str]]
"""For each norm, the attributes that are read, each with a description of the forward that does."""

MODULE_ATTRIBUTES = frozenset(dir(nn.Module())) - {CLASS}
"""Attributes that every module has, such as ``forward`` and ``training``; reading them is safe."""


def find_reads(model: nn.Module) -> Reads:
    """Find the attributes of norms that forwards read through paths that start at ``self``."""
    found: dict[nn.Module, dict[str, str]] = {}
    for name, module in model.named_modules():
        if is_norm(module):
            continue
        who = f"the forward of {name or 'the model'} ({type(module).__name__})"
        for path in sorted(read_by_forward(type(module))):
            for norm in _norms_at(module, path[:-1]):
                if path[-1] not in MODULE_ATTRIBUTES:
                    found.setdefault(norm, {}).setdefault(path[-1], who)
    return found


def _norms_at(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Yield the norms at the end of a path that starts at a module."""
    at: list[Any] = [module]
    for name in path:
        at = [value for each in at for value in _lookup(each, name)]
    return (value for value in at if isinstance(value, nn.Module) and is_norm(value))


def _lookup(value: Any, name: str) -> Iterable[Any]:
    """Return the attributes or elements that one name of a path refers to."""
    if isinstance(value, nn.Module):
        if name == EACH:
            return list(value.children())
        if name in value._modules:
            return [value._modules[name]]
        is_property = isinstance(getattr(type(value), name, None), property)
        return [getattr(value, name, None)] if is_property else [vars(value).get(name)]
    if isinstance(value, list | tuple):
        return value if name == EACH else [v for i, v in enumerate(value) if str(i) == name]
    return []


def require_readable(old: nn.Module, new: nn.Module, reads: Mapping[str, str]) -> None:
    """Refuse a new layer that lacks an attribute that a forward reads from the old one.

    Raises:
        ConversionError: If it lacks any; the error names them and the forward.
    """
    lacking = [name for name in reads if name != CLASS and _lacks(new, old, name)]
    if lacking:
        raise ConversionError(
            f"{reads[lacking[0]]} reads its {', '.join(lacking)}, which {type(new).__name__} does "
            f"not have; leave the layer out with where=, or convert before the block is fused"
        )


def _lacks(new: nn.Module, old: nn.Module, name: str) -> bool:
    before, after = getattr(old, name, None), getattr(new, name, None)
    if before is None or after is None:
        return before is not None
    return isinstance(before, Tensor) and before.shape != getattr(after, "shape", None)


def described(reads: Mapping[str, str]) -> Iterator[str]:
    """Describe which forwards read which attributes, for a report."""
    for who in dict.fromkeys(reads.values()):
        names = [name for name, each in reads.items() if each == who and name != CLASS]
        uses = [f"reads its {', '.join(names)} itself"] if names else []
        uses += ["checks its class"] if reads.get(CLASS) == who else []
        yield f"{who} {' and '.join(uses)}"
