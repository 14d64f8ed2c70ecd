"""Running statistics that see the whole of an accumulated batch."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
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
from normkit.layers.batch_channel import EstimatedBatchNorm
from normkit.passes import Temporary, bare, require_uncompiled, swaps_statistics
from normkit.passes.inputs import first_argument
from normkit.text import module_name

ACCUMULATE = "accumulate statistics of"


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
    inner = bare(model, ACCUMULATE)
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
        self.steps, self.num_pending, self.inside = steps, 0, False
        self._followers = tuple(waiting.values())
        self._handles: list[Any] = []
        try:
            self._attach(model, waiting)
        except BaseException:
            self.remove()
            raise

    num_pending: int
    """Training forwards that the running statistics have yet to follow."""
    inside: bool
    """Whether a training forward of the model runs."""

    def flush(self) -> None:
        """Let the running statistics follow what is pending, as a smaller batch.

        Over several processes, all of them must call it.
        """
        for follower in self._followers:
            follower.move()
            follower.forget()
        self.num_pending = 0

    def remove(self) -> None:
        """End it: no hook is left, and what is pending is dropped."""
        for handle in self._handles:
            handle.remove()
        for follower in self._followers:
            follower.forget()
        self.num_pending, self.inside = 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.remove()

    def _attach(self, model: nn.Module, waiting: Mapping[nn.Module, Follower]) -> None:
        """Hang hooks on the model, around those of its norms: the model may be one itself."""
        self._handles.append(model.register_forward_pre_hook(Temporary(self._begin)))
        for norm in find_norms(model):
            followers = [waiting[part] for part in norm.modules() if part in waiting]
            if followers:
                calls = _Calls(self, followers)
                begin = Temporary(calls.begin, swaps_statistics=True)
                end = Temporary(calls.end)
                self._handles += [
                    norm.register_forward_pre_hook(begin, with_kwargs=True),
                    norm.register_forward_hook(end, with_kwargs=True, always_call=True),
                ]
        self._handles += [
            model.register_forward_hook(Temporary(self._count)),
            model.register_forward_hook(Temporary(self._end), always_call=True),
        ]

    def _begin(self, *_: object) -> None:
        self.inside = not are_still()
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


class _Calls:
    """Hooks around the calls of one norm, which may hold several layers."""

    def __init__(self, accumulation: Accumulation, followers: list[Follower]) -> None:
        self._accumulation = accumulation
        self._followers = followers

    def begin(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the layers write into copies; a checkpoint's second look does so for nothing."""
        if self._accumulation.inside or is_second_look():
            for follower in self._followers:
                follower.begin()

    def end(
        self,
        norm: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor | None,  # None where the forward raised
    ) -> None:
        """Keep what the copies have become."""
        counts = self._accumulation.inside and not are_still() and result is not None
        number = _num_positions(norm, args, kwargs) if counts else 0
        for follower in self._followers:
            if counts:
                follower.end(number)
            else:
                follower.put_back()


def _num_positions(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Positions of a norm's input, over all examples; the valid ones where a mask says so."""
    x = feature_map(norm, first_argument(args, kwargs))
    valid = valid_positions(norm, x, args, kwargs)
    return x.numel() // max(x.shape[1], 1) if valid is None else int(valid.sum())


def _why_left(layer: nn.Module) -> str | None:
    if is_frozen(layer):
        return "its statistics are frozen"
    if isinstance(layer, EstimatedBatchNorm):
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
