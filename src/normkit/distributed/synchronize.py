"""Every norm with batch statistics made to use those of all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.convert.api import convert_norm_
from normkit.convert.report import Change
from normkit.convert.selection import find_norms
from normkit.convert.target import pools_examples
from normkit.core.ranks import ProcessGroup, held_group
from normkit.errors import OptionError
from normkit.inference.freeze import is_frozen
from normkit.layers.base import NormLayer
from normkit.passes import all_or_nothing, require_unwrapped
from normkit.text import module_name

Where = Callable[[nn.Module, str], bool]
NOT_OVER_BATCH = "it takes no statistics over a batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Synchronization:
    """What ``synchronize_`` did.

    Args:
        model: The model; a new layer where the model itself was a norm of torch's.
        names: Norms that use the statistics of all processes now.
        replaced: Those among them that were another library's.
        left: All other norms, with the reason.
        warnings: What there is to know of those that were replaced, as of any conversion.
    """

    model: nn.Module
    names: tuple[str, ...]
    replaced: tuple[str, ...]
    left: dict[str, str]
    warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"statistics over all processes: {', '.join(map(module_name, self.names))}"]
        if self.replaced:
            lines.append(
                f"replaced by layers of ours: {', '.join(map(module_name, self.replaced))}"
            )
        for why in dict.fromkeys(self.left.values()):
            names = ", ".join(module_name(name) for name, each in self.left.items() if each == why)
            lines.append(f"left alone, {why}: {names}")
        for warning in dict.fromkeys(w for each in self.warnings.values() for w in each):
            names = ", ".join(
                module_name(n) for n, each in self.warnings.items() if warning in each
            )
            lines.append(f"{names}: {warning}")
        return "\n".join(lines)


@all_or_nothing
def synchronize_(
    model: nn.Module, process_group: ProcessGroup = None, *, where: Where | None = None
) -> Synchronization:
    """Let every norm with batch statistics use those of all processes in training, in place.

    The ``BatchNorm*d`` and ``SyncBatchNorm`` of torch and timm become ``BatchNorm`` of ours with
    the very same parameters, state dict and outputs; all of ours that pool or track statistics of
    several examples, composites included, get the ``process_group``. Everything is checked before
    anything changes; a second call only sets the group. Call it before wrapping the model in
    DistributedDataParallel, sharding or compiling it; an optimizer stays valid.

    Args:
        model: Changed in place, on every process alike.
        process_group: A ``torch.distributed`` group, or ``"world"``, which None means too: all
            processes, once ``torch.distributed`` is initialised.
        where: ``where(module, name)`` says of each norm whether it is meant; by default all.

    Returns:
        A report that can be printed; its ``.model`` matters where the model itself is a norm.

    Raises:
        OptionError: If no norm that is meant has batch statistics, the model is wrapped, sharded
            or compiled, or the group is none.
        ConversionError: If a batch norm is of a class that is not known, or lazy and empty; all
            are named.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
        >>> print(synchronize_(model))
        statistics over all processes: 1
        replaced by layers of ours: 1
        left alone, it takes no statistics over a batch: 2
        >>> model[1]._get_name(), model[1].process_group
        ('BatchNorm', 'world')
    """
    group: ProcessGroup = "world" if process_group is None else process_group
    held_group(group)
    require_unwrapped(model, "synchronise")
    found = find_norms(model)
    left = {names[0]: why for m, names in found.items() if (why := _why_left(m, names[0], where))}
    meant = {module: names[0] for module, names in found.items() if names[0] not in left}
    _require_some(model, meant, left)
    foreign = {m: name for m, name in meant.items() if not isinstance(m, NormLayer)}
    changes: tuple[Change, ...] = ()
    if foreign:
        done = convert_norm_(model, "bn", where=lambda module, _: module in foreign)
        model, changes = done.model, done.changes
    for module, names in find_norms(model).items():
        if names[0] in meant.values():
            module.process_group = group  # type: ignore[assignment]
    return Synchronization(
        model=model,
        names=tuple(meant.values()),
        replaced=tuple(foreign.values()),
        left=left,
        warnings={c.name: told for c in changes if (told := _told(c))},
    )


def _told(change: Change) -> tuple[str, ...]:
    lost = (f"lost: {', '.join(change.lost)}",) if change.lost else ()
    return (*change.warnings, *lost)


def _why_left(module: nn.Module, name: str, where: Where | None) -> str | None:
    """Why a norm does not take part; None if it does."""
    if where is not None and not where(module, name):
        return "where= leaves it out"
    if any(map(is_frozen, module.modules())):
        return "its statistics are frozen"
    if isinstance(module, NormLayer):
        return None if pools_examples(module) else NOT_OVER_BATCH
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "it is torch's tracked instance norm, which convert_norm_ replaces"
    if isinstance(module, _BatchNorm):
        return None
    return NOT_OVER_BATCH


def _require_some(
    model: nn.Module, meant: Mapping[nn.Module, str], left: Mapping[str, str]
) -> None:
    if meant:
        return
    reasons = "; ".join(f"{module_name(name)}: {why}" for name, why in list(left.items())[:8])
    raise OptionError(
        f"{type(model).__name__} has no norm whose statistics could be taken over several "
        f"processes" + (f" ({reasons})" if reasons else "; it has no norm at all")
    )
