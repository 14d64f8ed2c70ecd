"""Update running statistics once for the whole batch of an accumulated gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, Self

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.convert.selection import find_norms
from normkit.core.check import require_count
from normkit.core.running import buffers_are_frozen, is_recomputing
from normkit.distributed.delayed import DelayedStatistics
from normkit.errors import OptionError
from normkit.inference.freeze import is_frozen
from normkit.inference.guard import is_guarded
from normkit.inference.norm_classes import describe_own_forward, normalizes_its_input
from normkit.inference.tracked import (
    feature_map,
    tracked,
    unknown_layers,
    valid_positions,
    why_not_updated,
)
from normkit.layers.base import is_estimated
from normkit.passes import (
    Hooks,
    TemporaryHook,
    all_or_nothing,
    call_with_cleanup,
    require_uncompiled,
    run_cleanup,
    save_grad_mode,
    swaps_statistics,
    unwrap,
)
from normkit.passes.inputs import first_argument
from normkit.text import module_name

ACCUMULATE = "accumulate statistics of"


@all_or_nothing
def accumulate_statistics(model: nn.Module, steps: int) -> Accumulation:
    """Update running statistics once for the whole batch of an accumulated gradient.

    The statistics of every ``steps`` training forwards are merged by their counts. The buffers are
    then updated once, as if all these inputs had been one batch. Each forward still normalises by
    its own batch. A layer that is called several times in a forward has one update for each call.
    Forwards at evaluation, recomputed forwards and forwards that raise do not count. A part of the
    model that is called by itself updates its buffers immediately.

    Args:
        model: Not compiled; it may be inside DistributedDataParallel.
        steps: Number of forwards that make a batch.

    Returns:
        A context manager, which is also a handle. At the end of the block the buffers are updated
        by the pending forwards; an exception or ``remove()`` discards these.

    Raises:
        OptionError: If no layer has running statistics whose update can be delayed, ``steps`` is
            no positive integer, the model is compiled, or its statistics are accumulated already.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
        >>> with accumulate_statistics(model, steps=2):
        ...     for part in (torch.randn(4, 6), torch.randn(2, 6)):
        ...         model(part).sum().backward()
        >>> model[1].num_batches_tracked
        tensor(1)
    """
    steps = require_count("steps", steps)
    inner = unwrap(model, ACCUMULATE)
    require_uncompiled(model, ACCUMULATE)
    _require_free(inner)
    return Accumulation(inner, steps)


class Accumulation:
    """Running statistics that are updated once for several forwards.

    Args:
        model: The model whose forwards count.
        steps: Number of forwards that make a batch.
    """

    steps: int
    names: tuple[str, ...]
    """Layers whose updates are delayed."""
    left: Mapping[str, str]
    """Layers with running statistics that are updated at every forward, with the reason."""
    num_pending: int
    """Training forwards that the running statistics do not contain yet."""
    inside: bool
    """Whether a training forward of the model is running."""
    is_over: bool
    """Whether the accumulation has ended."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        layers = tracked(model)
        unknown = _in_unknown(model)
        why_left = {name: _why_left(m) or unknown.get(m) for name, m in layers.items()}
        self.left = unknown_layers(model) | {name: why for name, why in why_left.items() if why}
        delayed = {
            layer: DelayedStatistics(layer)  # type: ignore[arg-type]
            for name, layer in layers.items()
            if name not in self.left
        }
        _require_some(model, delayed, self.left)
        self.names = tuple(name for name in layers if name not in self.left)
        self.steps, self.num_pending, self.inside, self.is_over = steps, 0, False, False
        self._delayed = tuple(delayed.values())
        self._wrappers: list[_ForwardWrapper] = []
        self._hooks = Hooks()
        self._attach(model, delayed)

    def flush(self) -> None:
        """Update the running statistics now, by the pending forwards as a smaller batch.

        An interruption leaves either all layers updated or none; in both cases nothing is pending
        afterwards. With several processes, all of them must call this.
        """
        call_with_cleanup(self._update, self._discard, save_grad_mode())

    def remove(self) -> None:
        """End the accumulation: restore the model's forwards, and discard pending forwards."""
        self.is_over = True
        wrappers = [wrapper.remove for wrapper in self._wrappers]
        run_cleanup([self._hooks.remove, *wrappers, self._discard, self._end])

    def _update(self) -> None:
        # All new values are computed first; only then does ``finish`` write them, in full.
        updates = [pair for delayed in self._delayed for pair in delayed.updates()]
        run_cleanup([partial(buffer.detach().copy_, values) for buffer, values in updates])

    def _discard(self) -> None:
        for delayed in self._delayed:
            delayed.reset()
        self.num_pending = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            try:
                if kind is None:
                    self.flush()
            finally:
                self.remove()
        except BaseException:
            # An interruption may have cut the first call of ``remove`` short.
            self.remove()
            raise

    def _attach(self, model: nn.Module, delayed: Mapping[nn.Module, DelayedStatistics]) -> None:
        """Put hooks on the model, and wrap the forwards of its norms; it may be a norm itself."""
        self._hooks.before(model, TemporaryHook(self._begin))
        for norm in find_norms(model):
            parts = [delayed[part] for part in norm.modules() if part in delayed]
            if parts:
                self._wrappers.append(_ForwardWrapper(norm, self, parts))
        self._hooks.after(model, TemporaryHook(self._count))
        self._hooks.after(model, TemporaryHook(self._end), always_call=True)

    def _begin(self, *_: object) -> None:
        self.inside = not self.is_over and not buffers_are_frozen()
        for delayed in self._delayed:
            delayed.discard_forward()

    def _count(self, *_: object) -> None:
        has_calls = [delayed.keep_forward() for delayed in self._delayed if self.inside]
        if any(has_calls):
            self.num_pending += 1
            if self.num_pending == self.steps:
                self.flush()

    def _end(self, *_: object) -> None:
        self.inside = False


class _ForwardWrapper:
    """Replaces a norm's forward: calls it while the norm's layers update copies of their buffers.

    The copies are recorded, unless a checkpoint recomputes the forward. Hooks could not do this:
    torch calls none when Ctrl-C ends a forward, and the copies would stay in the layers.

    Args:
        norm: The norm.
        accumulation: Says when a forward counts.
        delayed: The statistics of the norm's layers.
    """

    swaps_statistics = True

    def __init__(
        self, norm: nn.Module, accumulation: Accumulation, delayed: list[DelayedStatistics]
    ) -> None:
        self._norm, self._accumulation, self._delayed = norm, accumulation, delayed
        self._own: Callable[..., Any] | None = vars(norm).get("forward")
        self._forward: Callable[..., Any] = norm.forward
        vars(norm)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the norm's output."""
        end = [delayed.restore_buffers for delayed in self._delayed]
        return call_with_cleanup(
            lambda: self._call_and_record(args, kwargs), *end, save_grad_mode()
        )

    def _call_and_record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        accumulation = self._accumulation
        # A recomputed forward must not touch the buffers either, but its copies are discarded.
        if accumulation.inside or (is_recomputing() and not accumulation.is_over):
            for delayed in self._delayed:
                delayed.use_copies()
        result = self._forward(*args, **kwargs)
        if accumulation.inside and not buffers_are_frozen():
            num_positions = _num_positions(self._norm, args, kwargs)
            for delayed in self._delayed:
                delayed.record_call(num_positions)
        return result

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module]]:
        """In a copy of the norm, the forward of the norm's class replaces this wrapper."""
        return _forward_of_class, (self._norm,)

    def remove(self) -> None:
        """Restore the norm's forward, unless another wrapper was put around this one since."""
        if vars(self._norm).get("forward") is self:
            if self._own is None:
                del vars(self._norm)["forward"]
            else:
                vars(self._norm)["forward"] = self._own


def _forward_of_class(norm: nn.Module) -> MethodType:
    return MethodType(type(norm).forward, norm)


def _num_positions(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Count the positions of a norm's input over all examples; with a mask, the valid ones."""
    x = feature_map(norm, first_argument(args, kwargs))
    valid = valid_positions(norm, x, args, kwargs)
    return x.numel() // max(x.shape[1], 1) if valid is None else int(valid.sum())


def _why_left(layer: nn.Module) -> str | None:
    """Why a layer's updates cannot be delayed; None if they can."""
    if is_frozen(layer):
        return "its statistics are frozen"
    if is_estimated(layer):
        return "it normalises by its running estimates in training"
    if isinstance(layer, _InstanceNorm):
        return "it is torch's instance norm, which averages examples; convert_norm_ replaces it"
    return why_not_updated(layer) or None


def _in_unknown(model: nn.Module) -> dict[nn.Module, str]:
    """Find the norms with an unknown forward, and the layers inside them, with the reason."""
    unknown = [norm for norm in find_norms(model) if not normalizes_its_input(norm)]
    return {
        part: f"{describe_own_forward(norm)}, so it is unknown what it normalises"
        for norm in unknown
        for part in norm.modules()
    }


def _require_some(model: nn.Module, delayed: Mapping[Any, Any], left: Mapping[str, str]) -> None:
    if not delayed:
        reasons = "; ".join(f"{module_name(name)}: {why}" for name, why in left.items())
        raise OptionError(
            f"{type(model).__name__} has no layer whose running statistics can be accumulated"
            + (f" ({reasons})" if reasons else "; norms of single examples keep none")
        )


def _require_free(model: nn.Module) -> None:
    for module in model.modules():
        if is_guarded(module):
            raise OptionError(
                "a guard checks the model's statistics at every forward; remove it with "
                "guard.remove() first, or do not accumulate the statistics"
            )
        if swaps_statistics(module):
            raise OptionError(
                "the model's statistics are accumulated already; end that accumulation with "
                "remove(), or by leaving its block"
            )
