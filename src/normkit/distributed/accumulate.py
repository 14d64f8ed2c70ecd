"""Running statistics that see the whole of an accumulated batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType, TracebackType
from typing import Any, Self

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.convert.selection import find_norms
from normkit.core.check import require_count
from normkit.core.running import are_still, is_second_look
from normkit.distributed.follower import Follower
from normkit.errors import OptionError
from normkit.inference.freeze import is_frozen
from normkit.inference.guard import is_guarded
from normkit.inference.known import own_forward, takes_input_as_it_is
from normkit.inference.tracked import feature_map, foreign, tracked, valid_positions, why_still
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
    """Let running statistics see the whole batch of an accumulated gradient.

    Of every ``steps`` training forwards of the model the statistics are merged by their counts,
    and the buffers move once, as they do for all these inputs at once. Every forward normalises
    by its own batch as ever. Layers that are called several times in a forward move once for each
    call, as ever. Forwards at evaluation do not count, nor do a checkpoint's second look and what
    raises; parts of the model that are called alone move their buffers as ever.

    Args:
        model: Not compiled; it may be inside DistributedDataParallel.
        steps: Forwards that make a batch.

    Returns:
        A context manager, or a handle: leaving the block lets the buffers follow what is pending,
        an exception and ``remove()`` drop it.

    Raises:
        OptionError: If no layer has running statistics that could wait, ``steps`` is no whole
            number from 1, the model is compiled, or its statistics are accumulated already.

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
    """Statistics that wait for their batch to be whole.

    Args:
        model: Whose forwards count.
        steps: Forwards that make a batch.
    """

    steps: int
    names: tuple[str, ...]
    """Layers whose statistics wait."""
    left: Mapping[str, str]
    """Layers with running statistics that move as ever, with the reason."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        layers = tracked(model)
        unknown = _in_unknown(model)
        why_left = {name: _why_left(m) or unknown.get(m) for name, m in layers.items()}
        self.left = foreign(model) | {name: why for name, why in why_left.items() if why}
        waiting = {layer: Follower(layer) for n, layer in layers.items() if n not in self.left}  # type: ignore[arg-type]
        _require_some(model, waiting, self.left)
        self.names = tuple(name for name in layers if name not in self.left)
        self.steps, self.num_pending, self.inside, self.is_over = steps, 0, False, False
        self._followers = tuple(waiting.values())
        self._around: list[_Around] = []
        self._hooks = Hooks()
        self._attach(model, waiting)

    num_pending: int
    """Training forwards that the running statistics have yet to follow."""
    inside: bool
    """Whether a training forward of the model runs."""
    is_over: bool
    """Whether nothing waits any more."""

    def flush(self) -> None:
        """Let the running statistics follow what is pending, as a smaller batch.

        All of them move or, if that is interrupted, none; nothing is pending then. Over several
        processes, all of them must call it.
        """
        call_with_cleanup(self._move, self._forget, save_grad_mode())

    def remove(self) -> None:
        """End it: the model is called as before, and what is pending is dropped."""
        self.is_over = True
        around = [each.remove for each in self._around]
        run_cleanup([self._hooks.remove, *around, self._forget, self._end])

    def _move(self) -> None:
        moved = [pair for follower in self._followers for pair in follower.moved()]
        run_cleanup([partial(buffer.detach().copy_, values) for buffer, values in moved])

    def _forget(self) -> None:
        for follower in self._followers:
            follower.forget()
        self.num_pending = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            try:
                if kind is None:
                    self.flush()
            finally:
                self.remove()
        except BaseException:  # also where the lines above were interrupted
            self.remove()
            raise

    def _attach(self, model: nn.Module, waiting: Mapping[nn.Module, Follower]) -> None:
        """Put hooks into the model, and stand around its norms: it may be one itself."""
        self._hooks.before(model, TemporaryHook(self._begin))
        for norm in find_norms(model):
            followers = [waiting[part] for part in norm.modules() if part in waiting]
            if followers:
                self._around.append(_Around(norm, self, followers))
        self._hooks.after(model, TemporaryHook(self._count))
        self._hooks.after(model, TemporaryHook(self._end), always_call=True)

    def _begin(self, *_: object) -> None:
        self.inside = not self.is_over and not are_still()
        for follower in self._followers:
            follower.drop()

    def _count(self, *_: object) -> None:
        seen = [follower.commit() for follower in self._followers if self.inside]
        if any(seen):
            self.num_pending += 1
            if self.num_pending == self.steps:
                self.flush()

    def _end(self, *_: object) -> None:
        self.inside = False


class _Around:
    """Stands in the place of a norm's forward, calls it, and lets its layers write into copies.

    What these become is kept, unless it is a checkpoint's second look. Not hooks do that, because
    torch calls none when Ctrl-C ends a forward, and the copies would stay.

    Args:
        norm: The norm.
        accumulation: Says when copies count.
        followers: Of the layers that the norm consists of.
    """

    swaps_statistics = True

    def __init__(
        self, norm: nn.Module, accumulation: Accumulation, followers: list[Follower]
    ) -> None:
        self._norm, self._accumulation, self._followers = norm, accumulation, followers
        self._own: Callable[..., Any] | None = vars(norm).get("forward")
        self._forward: Callable[..., Any] = norm.forward
        vars(norm)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the norm's forward
        """Compute the norm's output."""
        end = [follower.put_back for follower in self._followers]
        return call_with_cleanup(lambda: self._followed(args, kwargs), *end, save_grad_mode())

    def _followed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        now = self._accumulation
        if now.inside or (is_second_look() and not now.is_over):
            for follower in self._followers:
                follower.begin()
        result = self._forward(*args, **kwargs)
        if now.inside and not are_still():
            number = _num_positions(self._norm, args, kwargs)
            for follower in self._followers:
                follower.end(number)
        return result

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module]]:
        """A copy of the norm gets its class's forward."""
        return _own_forward, (self._norm,)

    def remove(self) -> None:
        """Put the norm's own forward back, unless somebody else stands around this one by now."""
        if vars(self._norm).get("forward") is self:
            if self._own is None:
                del vars(self._norm)["forward"]
            else:
                vars(self._norm)["forward"] = self._own


def _own_forward(norm: nn.Module) -> MethodType:
    return MethodType(type(norm).forward, norm)


def _num_positions(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Positions of a norm's input, over all examples; the valid ones where a mask says so."""
    x = feature_map(norm, first_argument(args, kwargs))
    valid = valid_positions(norm, x, args, kwargs)
    return x.numel() // max(x.shape[1], 1) if valid is None else int(valid.sum())


def _why_left(layer: nn.Module) -> str | None:
    if is_frozen(layer):
        return "its statistics are frozen"
    if is_estimated(layer):
        return "its estimates normalise in training"
    if isinstance(layer, _InstanceNorm):
        return "it is torch's instance norm, which averages examples; convert_norm_ replaces it"
    return why_still(layer) or None


def _in_unknown(model: nn.Module) -> dict[nn.Module, str]:
    """Norms whose forward is not known, and what is inside of them, with the reason."""
    unknown = [norm for norm in find_norms(model) if not takes_input_as_it_is(norm)]
    return {
        part: f"{own_forward(norm)}, so what it normalises is not known"
        for norm in unknown
        for part in norm.modules()
    }


def _require_some(model: nn.Module, waiting: Mapping[Any, Any], left: Mapping[str, str]) -> None:
    if not waiting:
        reasons = "; ".join(f"{module_name(name)}: {why}" for name, why in left.items())
        raise OptionError(
            f"{type(model).__name__} has no layer whose running statistics could wait"
            + (f" ({reasons})" if reasons else "; those of one example keep none")
        )


def _require_free(model: nn.Module) -> None:
    for module in model.modules():
        if is_guarded(module):
            raise OptionError(
                "the model's statistics are guarded batch by batch; take that out with "
                "guard.remove() first, or let them move at every forward"
            )
        if swaps_statistics(module):
            raise OptionError(
                "the model's statistics are accumulated already; end that with remove(), or by "
                "leaving its block"
            )
