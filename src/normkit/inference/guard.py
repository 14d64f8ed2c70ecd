"""Running statistics that no batch with NaN or infinity moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.core.running import is_second_look
from normkit.errors import OptionError
from normkit.inference.known import is_fixed
from normkit.inference.tracked import STATISTICS, callers, foreign, tracked, why_still
from normkit.kernels.select import functorch_is_active
from normkit.layers.base import BUFFERS
from normkit.passes import (
    all_or_nothing,
    attempt,
    require_uncompiled,
    run_cleanup,
    swaps_statistics,
    unwrap,
)
from normkit.passes.cleanup import CleanupStep
from normkit.text import module_name, table_lines


@all_or_nothing
def guard_statistics_(model: nn.Module) -> Guard:
    r"""Let no batch that is not finite move a model's running statistics.

    One NaN or infinity in a training batch, as an overflow in 16 bits makes it, leaves running
    statistics NaN for good: the average of anything with NaN is NaN. With the guard, a batch that
    would make a finite running mean or variance of a layer NaN or infinite leaves all of the
    layer's statistics, and its count of batches, as they were; what the layer puts out is as ever.
    Nothing waits for the device: such batches are counted there, and read when the report is.

    The guard works by hooks, which go with copies and pickles of the model; state dicts stay as
    they are. Set it before the model is compiled or sharded; DistributedDataParallel, autocast and
    activation checkpoints, whose second look counts for no second batch, do not matter.

    Args:
        model: Holds layers with running statistics: torch's, subclasses, ours, composites
            included, and others that have ``running_mean`` and ``running_var``.

    Returns:
        A handle that prints what was refused and has ``remove()`` and, for ``GradScaler``,
        ``update(scaler)``. Of a model that is guarded already, a handle of the same guard.

    Raises:
        OptionError: If no layer has running statistics, one does not know its number of channels
            yet, the model is compiled, its layers cannot be looked into, or its statistics are
            accumulated over several forwards.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
        >>> guard = guard_statistics_(model)
        >>> for batch in (torch.ones(4, 6), torch.full((4, 6), torch.nan)):
        ...     _ = model(batch)
        >>> print(guard)
        1 of 2 batches was not finite and did not move the statistics, at most in 1
          name  layer        batches  refused  taken back
          1     BatchNorm1d  2        1        0
        >>> bool(model[1].running_mean.isfinite().all()), model[1].num_batches_tracked
        (True, tensor(1))
    """
    inner = unwrap(model, "guard")
    require_uncompiled(model, "guard")
    modules = dict(inner.named_modules())
    others = {name: modules[name] for name in foreign(inner) if not is_fixed(modules[name])}
    layers = tracked(inner) | others
    if not layers:
        raise OptionError(
            f"{type(inner).__name__} has no layer with running statistics, so there is nothing to "
            f"guard"
        )
    if any(map(swaps_statistics, inner.modules())):
        raise OptionError(
            "the model's statistics are accumulated over several forwards, and move after the last "
            "alone; end that first"
        )
    names = {layer: name for name, layer in layers.items()}
    for caller, parts in callers(inner, layers).items():
        watch = _watch_of(caller) or _put_into(caller)
        for part in parts:
            watch.counts.setdefault(_within(caller, part), _Counts(names[part]))
    return Guard(inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardedLayer:
    """What a guard has seen of one layer.

    Args:
        name: Its name.
        kind: Its class.
        num_batches: Training batches that it has normalised.
        num_refused: Those among them that were not finite, and did not move its statistics.
        num_taken_back: Those that moved them and were taken back with their optimizer step.
    """

    name: str
    kind: str
    num_batches: int
    num_refused: int
    num_taken_back: int


class Guard:
    """Handle of ``guard_statistics_``; prints as a table.

    Args:
        model: The guarded model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """What was seen so far, layer by layer; asking waits for the device."""
        return tuple(
            GuardedLayer(
                name=counts.name,
                kind=type(layer).__name__,
                num_batches=int(counts.seen),
                num_refused=int(counts.seen - counts.accepted),
                num_taken_back=int(counts.taken_back),
            )
            for layer, counts in self._counted()
        )

    def update(self, scaler: Any) -> None:  # noqa: ANN401 - a torch.amp.GradScaler, or one like it
        """Call ``scaler.update()``; if the scaler skipped the step, take its batches back.

        To be called at every step in the place of ``scaler.update()``. When gradients overflow the
        scaler skips the optimizer's step; all batches since the last call then leave no trace in
        the running statistics either, finite ones included.

        Args:
            scaler: Has ``update()`` and ``get_scale()``, which is smaller after a skipped step.
        """
        before = scaler.get_scale()
        scaler.update()
        skipped = scaler.get_scale() < before
        run_cleanup(
            step
            for layer, counts in self._counted()
            for step in counts.next_step(layer, take_back=skipped)
        )

    def remove(self) -> None:
        """Take the guard out of the model, and of nothing else; a second time does nothing."""
        attempt(self._remove, self.model)

    def _remove(self) -> None:
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if _owner(hook) is not None]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)

    @property
    def reading(self) -> str:
        """How many batches were refused, in one sentence."""
        rows = self.layers
        if not rows:
            return "the guard was removed"
        worst = max(rows, key=lambda row: row.num_refused)
        if not worst.num_refused:
            return f"all of {max(row.num_batches for row in rows)} batches were finite"
        one = worst.num_refused == 1
        return (
            f"{worst.num_refused} of {worst.num_batches} batches {'was' if one else 'were'} not "
            f"finite and did not move the statistics, at most in {module_name(worst.name)}"
        )

    def __str__(self) -> str:
        head = ("name", "layer", "batches", "refused", "taken back")
        rows = [
            (module_name(name), kind, *map(str, numbers))
            for name, kind, *numbers in map(astuple, self.layers)
        ]
        return "\n".join([self.reading, *(table_lines([head, *rows]) if rows else ())])

    def _counted(self) -> Iterator[tuple[nn.Module, _Counts]]:
        for module in self.model.modules():
            watch = _watch_of(module)
            for path, counts in watch.counts.items() if watch else ():
                layer = _part(module, path)
                if _has_statistics(layer):
                    yield layer, counts


def _has_statistics(layer: nn.Module) -> bool:
    """Whether there are some; a norm that has taken over from a guarded one may have none."""
    return all(layer._buffers.get(name) is not None for name in BUFFERS)


class _State(NamedTuple):
    """Copies of a layer's statistics: running mean and variance in one piece, and the count."""

    moments: Tensor
    num_batches: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> _State:
        """Copy them."""
        mean, var, count = (layer._buffers.get(name) for name in STATISTICS)
        moments = torch.cat([mean.flatten(), var.flatten()])  # type: ignore[union-attr]
        return cls(moments, None if count is None else count.clone())

    def write(self, layer: nn.Module) -> None:
        """Write them back, so that autograd does not notice: torch's norms keep theirs for it."""
        half = len(self.moments) // 2
        values = (self.moments[:half], self.moments[half:], self.num_batches)
        for name, value in zip(STATISTICS, values, strict=True):
            buffer = layer._buffers.get(name)
            if value is not None and buffer is not None:
                buffer.data.copy_(value.view_as(buffer))


class _Counts:
    """Batches of one layer, and its statistics before the last one and before the step.

    Args:
        name: The layer's name in the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen, self.accepted, self.taken_back, self._earlier = (
            torch.zeros((), dtype=torch.long) for _ in range(4)
        )
        self._before: _State | None = None
        self._at_step: _State | None = None

    def keep(self, layer: nn.Module) -> None:
        """Copy the statistics that a batch is about to move."""
        self._before = None
        moves = layer.training and _has_statistics(layer) and not why_still(layer)
        if moves and not functorch_is_active():
            with torch.no_grad():
                self._before = _State.of(layer)
            if self._at_step is None:
                self._at_step = self._before

    @torch.no_grad()
    def judge(self, layer: nn.Module) -> None:
        """Put the copies back if the batch has left something that is not finite."""
        before, self._before = self._before, None
        if before is None:
            return
        now = _State.of(layer)
        is_fine = _stays_finite(before.moments, now.moments)
        moments = torch.where(is_fine, now.moments, before.moments)
        _State(moments, _either(is_fine, now.num_batches, before.num_batches)).write(layer)
        if not is_second_look():
            self._to(is_fine.device)
            self.seen.add_(1)
            self.accepted.add_(is_fine)

    def next_step(self, layer: nn.Module, *, take_back: bool) -> list[CleanupStep]:
        """Steps that begin a new step, from the statistics before this one if it is taken back."""
        at_step, taken_back = self._at_step, self.taken_back
        if take_back and at_step is not None:
            taken_back = taken_back + self.accepted - self._earlier
        begun = {"taken_back": taken_back, "_earlier": self.accepted.clone(), "_at_step": None}
        write = [partial(at_step.write, layer)] if take_back and at_step is not None else []
        return [*write, partial(vars(self).update, begun)]

    def _to(self, device: torch.device) -> None:
        if self.seen.device != device:
            for name in ("seen", "accepted", "taken_back", "_earlier"):
                setattr(self, name, getattr(self, name).to(device))


class _Watch:
    """Hooks around the calls of one norm, which may hold several layers with statistics."""

    def __init__(self) -> None:
        self.counts: dict[str, _Counts] = {}
        """Of each layer, by its name in the norm."""

    def before(self, norm: nn.Module, _args: Any) -> None:  # noqa: ANN401
        """Called before the norm runs."""
        for path, counts in self.counts.items():
            counts.keep(_part(norm, path))

    def after(self, norm: nn.Module, _args: Any, _output: Any) -> None:  # noqa: ANN401
        """Called when the norm has run, or has raised."""
        for path, counts in self.counts.items():
            counts.judge(_part(norm, path))


def _part(norm: nn.Module, path: str) -> nn.Module:
    """A layer in a norm; the norm itself where that has taken over from another one."""
    found = norm
    for key in path.split("."):
        found = found._modules.get(key) or found
    return found


def _stays_finite(before: Tensor, now: Tensor) -> Tensor:
    """Whether all values are finite that were so before; the others say nothing of this batch."""
    was_finite = before.abs() < torch.inf
    largest = torch.linalg.vector_norm(torch.where(was_finite, now, 0), torch.inf)
    return largest < torch.inf  # which NaN is not either


def _either(is_fine: Tensor, now: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if now is None or before is None else torch.where(is_fine, now, before)


def _owner(hook: Any) -> _Watch | None:  # noqa: ANN401
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, _Watch) else None


def is_guarded(module: nn.Module) -> bool:
    """Whether a guard has its hooks in this module."""
    return _watch_of(module) is not None


def _put_into(module: nn.Module) -> _Watch:
    watch = _Watch()
    module.register_forward_pre_hook(watch.before)
    module.register_forward_hook(watch.after, prepend=True, always_call=True)
    return watch


def _watch_of(module: nn.Module) -> _Watch | None:
    """The guard's hooks of a norm, if there are some."""
    owners = map(_owner, module._forward_pre_hooks.values())
    return next((owner for owner in owners if owner is not None), None)


def _within(caller: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in caller.named_modules() if module is part)
