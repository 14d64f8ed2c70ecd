"""Let every norm with batch statistics use the batches of all processes."""

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
    """The report of ``synchronize_``.

    Args:
        model: The model; if the model itself was a norm of torch, the layer that replaces it.
        names: Norms that now use the statistics of all processes.
        replaced: Norms among them that were another library's and have been replaced.
        left: All other norms, with the reason.
        warnings: Warnings of the conversion, by the name of the replaced norm.
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
                f"replaced by layers of normkit: {', '.join(map(module_name, self.replaced))}"
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
    """Let every norm with batch statistics use the batches of all processes in training, in place.

    The ``BatchNorm*d`` and ``SyncBatchNorm`` of torch and timm are replaced by normkit's
    ``BatchNorm`` with the same parameter objects, state dict and outputs. All layers of normkit
    that pool or track statistics of several examples, also inside composites, get the
    ``process_group``. Everything is checked before anything is changed; a second call only sets the
    group. Call this before the model is wrapped in DistributedDataParallel, sharded or compiled;
    optimizers stay valid.

    Args:
        model: Changed in place; every process must make the same call.
        process_group: A ``torch.distributed`` group, or ``"world"`` for all processes once
            ``torch.distributed`` is initialised; None means ``"world"``.
        where: ``where(module, name)`` chooses the norms; by default all.

    Returns:
        A report that can be printed. If the model itself is a norm, use its ``.model`` from now on.

    Raises:
        OptionError: If no chosen norm has batch statistics, the model is wrapped, sharded or
            compiled, or ``process_group`` is no process group.
        ConversionError: If batch norms are of unknown classes, or lazy and not initialised; the
            message names all of them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
        >>> print(synchronize_(model))
        statistics over all processes: 1
        replaced by layers of normkit: 1
        left alone, it takes no statistics over a batch: 2
        >>> model[1]._get_name(), model[1].process_group
        ('BatchNorm', 'world')
    """
    group: ProcessGroup = "world" if process_group is None else process_group
    held_group(group)
    require_unwrapped(model, "synchronise")
    found = find_norms(model)
    left = {names[0]: why for m, names in found.items() if (why := _why_left(m, names[0], where))}
    chosen = {module: names[0] for module, names in found.items() if names[0] not in left}
    _require_some(model, chosen, left)
    replaced = {m: name for m, name in chosen.items() if not isinstance(m, NormLayer)}
    changes: tuple[Change, ...] = ()
    if replaced:
        done = convert_norm_(model, "bn", where=lambda module, _: module in replaced)
        model, changes = done.model, done.changes
    for module, names in find_norms(model).items():
        if names[0] in chosen.values():
            module.process_group = group  # type: ignore[assignment]
    return Synchronization(
        model=model,
        names=tuple(chosen.values()),
        replaced=tuple(replaced.values()),
        left=left,
        warnings={c.name: warnings for c in changes if (warnings := _warnings(c))},
    )


def _warnings(change: Change) -> tuple[str, ...]:
    lost = (f"lost: {', '.join(change.lost)}",) if change.lost else ()
    return (*change.warnings, *lost)


def _why_left(module: nn.Module, name: str, where: Where | None) -> str | None:
    """Why a norm cannot be synchronized; None if it can."""
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
    model: nn.Module, chosen: Mapping[nn.Module, str], left: Mapping[str, str]
) -> None:
    if chosen:
        return
    reasons = "; ".join(f"{module_name(name)}: {why}" for name, why in list(left.items())[:8])
    raise OptionError(
        f"{type(model).__name__} has no norm that can be synchronized"
        + (f" ({reasons})" if reasons else "; it has no norm at all")
    )
