"""Guard running statistics against batches with NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.core.running import is_recomputing
from normkit.errors import OptionError
from normkit.inference.norm_classes import is_fixed
from normkit.inference.tracked import STATISTICS, callers, tracked, unknown_layers, why_not_updated
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
    r"""Keep batches with NaN or infinity out of a model's running statistics.

    One NaN or infinity in a training batch, for instance from a 16-bit overflow, makes running
    statistics NaN for good, because a running average never loses a NaN. The guard refuses a batch
    that would make a finite running mean or variance of a layer NaN or infinite: all statistics of
    that layer, and its count of batches, then stay as they were. The layer's output does not
    change. The guard never waits for the device: it counts refused batches there, and reads the
    counts when the report is asked for.

    The guard consists of hooks, which copies and pickles of the model keep; state dicts do not
    change. Set it before the model is compiled or sharded. It works with DistributedDataParallel,
    autocast and gradient checkpointing; a recomputed forward does not count as a second batch.

    Args:
        model: Holds layers with running statistics: norms of torch, their subclasses, norms of
            normkit, also inside composites, and others with ``running_mean`` and ``running_var``.

    Returns:
        A handle. It prints how many batches were refused, and has ``remove()`` and, for
        ``GradScaler``, ``update(scaler)``. For a model with a guard it is a handle of that guard.

    Raises:
        OptionError: If no layer has running statistics, a layer does not know its number of
            channels yet, the model is compiled, its layers are not accessible (scripted, exported,
            sharded or quantized), or its statistics are accumulated over several forwards.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
        >>> guard = guard_statistics_(model)
        >>> for batch in (torch.ones(4, 6), torch.full((4, 6), torch.nan)):
        ...     _ = model(batch)
        >>> print(guard)
        1 of 2 batches was not finite and did not change the statistics of 1
          name  layer        batches  refused  taken back
          1     BatchNorm1d  2        1        0
        >>> bool(model[1].running_mean.isfinite().all()), model[1].num_batches_tracked
        (True, tensor(1))
    """
    inner = unwrap(model, "guard")
    require_uncompiled(model, "guard")
    modules = dict(inner.named_modules())
    others = {name: modules[name] for name in unknown_layers(inner) if not is_fixed(modules[name])}
    layers = tracked(inner) | others
    if not layers:
        raise OptionError(
            f"{type(inner).__name__} has no layer with running statistics, so there is nothing to "
            f"guard"
        )
    if any(map(swaps_statistics, inner.modules())):
        raise OptionError(
            "the model's statistics are accumulated over several forwards and updated only after "
            "the last; end the accumulation first"
        )
    names = {layer: name for name, layer in layers.items()}
    for caller, parts in callers(inner, layers).items():
        watch = _watch_of(caller) or _put_into(caller)
        for part in parts:
            path = next(path for path, module in caller.named_modules() if module is part)
            watch.counts.setdefault(path, _Counts(names[part]))
    return Guard(inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardedLayer:
    """How many batches of one layer a guard has refused.

    Args:
        name: The layer's name.
        kind: The name of its class.
        num_batches: Training batches that the layer has normalised.
        num_refused: Batches that were not finite, and did not change the statistics.
        num_taken_back: Batches whose changes were undone because the optimizer step was skipped.
    """

    name: str
    kind: str
    num_batches: int
    num_refused: int
    num_taken_back: int


class Guard:
    """The handle that ``guard_statistics_`` returns; it prints as a table.

    Args:
        model: The guarded model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The counts so far, layer by layer; reading them waits for the device."""
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

    def update(self, scaler: Any) -> None:
        """Call ``scaler.update()``; if the scaler skipped the step, undo the step's batches.

        Call this at every step instead of ``scaler.update()``. When gradients overflow, the scaler
        skips the optimizer's step. The running statistics then return to their values at the last
        call, so that even finite batches of the skipped step have no effect.

        Args:
            scaler: Has ``update()``, and ``get_scale()``, which returns less after a skipped step.
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
        """Remove the hooks of the guard, and no others; a second call does nothing."""
        attempt(self._remove, self.model)

    def _remove(self) -> None:
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if _owner(hook) is not None]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)

    @property
    def reading(self) -> str:
        """How many batches the layer with most refusals has refused, in one sentence."""
        rows = self.layers
        if not rows:
            return "the guard was removed"
        worst = max(rows, key=lambda row: row.num_refused)
        if not worst.num_refused:
            return f"all of {max(row.num_batches for row in rows)} batches were finite"
        one = worst.num_refused == 1
        return (
            f"{worst.num_refused} of {worst.num_batches} batches {'was' if one else 'were'} not "
            f"finite and did not change the statistics of {module_name(worst.name)}"
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
    """Whether a layer has statistics; a norm that replaced a guarded one may have none."""
    return all(layer._buffers.get(name) is not None for name in BUFFERS)


class _State(NamedTuple):
    """Copies of a layer's statistics: running mean and variance joined, and the batch count."""

    moments: Tensor
    num_batches: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> _State:
        """Copy a layer's statistics."""
        mean, var, count = (layer._buffers.get(name) for name in STATISTICS)
        moments = torch.cat([mean.flatten(), var.flatten()])  # type: ignore[union-attr]
        return cls(moments, None if count is None else count.clone())

    def write(self, layer: nn.Module) -> None:
        """Write the copies back into the layer's buffers."""
        half = len(self.moments) // 2
        values = (self.moments[:half], self.moments[half:], self.num_batches)
        for name, value in zip(STATISTICS, values, strict=True):
            buffer = layer._buffers.get(name)
            if value is not None and buffer is not None:
                # Torch's norms save the buffers for backward; autograd would reject a change that
                # it notices, so this writes through ``.data``.
                buffer.data.copy_(value.view_as(buffer))


class _Counts:
    """Counts of one layer's batches, and copies of its statistics.

    One copy is from before the present batch, and one from before the present optimizer step.

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
        """Copy the statistics before a batch updates them."""
        self._before = None
        updates = layer.training and _has_statistics(layer) and not why_not_updated(layer)
        if updates and not functorch_is_active():
            with torch.no_grad():
                self._before = _State.of(layer)
            if self._at_step is None:
                self._at_step = self._before

    @torch.no_grad()
    def judge(self, layer: nn.Module) -> None:
        """Restore the copies if the batch made the statistics NaN or infinite."""
        before, self._before = self._before, None
        if before is None:
            return
        now = _State.of(layer)
        is_fine = _stays_finite(before.moments, now.moments)
        moments = torch.where(is_fine, now.moments, before.moments)
        count = now.num_batches
        if count is not None and before.num_batches is not None:
            count = torch.where(is_fine, count, before.num_batches)
        _State(moments, count).write(layer)
        if not is_recomputing():
            # The counts stay on the device, so that nothing waits for it.
            self._to(is_fine.device)
            self.seen.add_(1)
            self.accepted.add_(is_fine)

    def next_step(self, layer: nn.Module, *, take_back: bool) -> list[CleanupStep]:
        """Actions that begin a new optimizer step; ``take_back`` undoes the step that ends.

        They are returned, not done, because ``finish`` must do those of all layers or none.
        """
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
    """Hooks around the calls of one norm; a composite holds several layers with statistics."""

    def __init__(self) -> None:
        self.counts: dict[str, _Counts] = {}
        """The counts of each layer, by the layer's name inside the norm."""

    def before(self, norm: nn.Module, _args: Any) -> None:
        """Copy the statistics before the norm runs."""
        for path, counts in self.counts.items():
            counts.keep(_part(norm, path))

    def after(self, norm: nn.Module, _args: Any, _output: Any) -> None:
        """Check the statistics when the norm has returned or raised."""
        for path, counts in self.counts.items():
            counts.judge(_part(norm, path))


def _part(norm: nn.Module, path: str) -> nn.Module:
    """Find a layer inside a norm; if the norm replaced a composite, that is the norm itself."""
    found = norm
    for key in path.split("."):
        found = found._modules.get(key) or found
    return found


def _stays_finite(before: Tensor, now: Tensor) -> Tensor:
    """Whether all values that were finite before still are; the others prove nothing."""
    was_finite = before.abs() < torch.inf
    largest = torch.linalg.vector_norm(torch.where(was_finite, now, 0), torch.inf)
    return largest < torch.inf  # False also for NaN


def _owner(hook: Any) -> _Watch | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, _Watch) else None


def is_guarded(module: nn.Module) -> bool:
    """Whether a guard has its hooks in this module."""
    return _watch_of(module) is not None


def _put_into(module: nn.Module) -> _Watch:
    watch = _Watch()
    module.register_forward_pre_hook(watch.before)
    # This hook runs before the user's, which may read the statistics, and after errors as well.
    module.register_forward_hook(watch.after, prepend=True, always_call=True)
    return watch


def _watch_of(module: nn.Module) -> _Watch | None:
    """The guard's hooks in a norm; None if it has none."""
    owners = map(_owner, module._forward_pre_hooks.values())
    return next((owner for owner in owners if owner is not None), None)
