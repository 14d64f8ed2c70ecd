"""Fields of a norm that the forward of another module reads, beside or instead of calling it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from normkit.convert.code import CLASS, EACH, Path, read_by_forward
from normkit.errors import ConversionError
from normkit.tracing.kinds import is_norm

Reads = Mapping[nn.Module, Mapping[str, str]]
"""Of each norm, what is read and by whom, in words."""

OF_ANY_MODULE = frozenset(dir(nn.Module())) - {CLASS}
"""What a forward may use of a norm whatever its kind: ``forward``, ``training``, ``parameters``."""


def find_reads(model: nn.Module) -> Reads:
    """Find what forwards read of norms, as far as their code names these by ``self``."""
    found: dict[nn.Module, dict[str, str]] = {}
    for name, module in model.named_modules():
        if is_norm(module):
            continue
        who = f"the forward of {name or 'the model'} ({type(module).__name__})"
        for path in sorted(read_by_forward(type(module))):
            for norm in _norms_at(module, path[:-1]):
                if path[-1] not in OF_ANY_MODULE:
                    found.setdefault(norm, {}).setdefault(path[-1], who)
    return found


def _norms_at(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """Norms that a path from a module leads to."""
    at: list[Any] = [module]
    for name in path:
        at = [value for each in at for value in _step(each, name)]
    return (value for value in at if isinstance(value, nn.Module) and is_norm(value))


def _step(value: Any, name: str) -> Iterable[Any]:  # noqa: ANN401 - what stands under a name
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
    """Refuse a new layer that lacks what a forward reads of the old one.

    Raises:
        ConversionError: With everything that is read, and by whom.
    """
    lacking = [name for name in reads if name != CLASS and _lacks(new, old, name)]
    if lacking:
        raise ConversionError(
            f"{reads[lacking[0]]} reads its {', '.join(lacking)}, which {type(new).__name__} does "
            f"not have; leave the layer alone with where=, or convert before the block is fused"
        )


def _lacks(new: nn.Module, old: nn.Module, name: str) -> bool:
    before, after = getattr(old, name, None), getattr(new, name, None)
    if before is None or after is None:
        return before is not None
    return isinstance(before, Tensor) and before.shape != getattr(after, "shape", None)


def described(reads: Mapping[str, str]) -> Iterator[str]:
    """Say who reads what, for a report."""
    for who in dict.fromkeys(reads.values()):
        names = [name for name, each in reads.items() if each == who and name != CLASS]
        asks = [f"reads its {', '.join(names)} itself"] if names else []
        asks += ["asks for its class"] if reads.get(CLASS) == who else []
        yield f"{who} {' and '.join(asks)}"
