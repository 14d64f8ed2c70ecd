"""Elimination singularities: channels that a ReLU sets to zero in all of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normkit.diagnostics.measurement import Measurement
from normkit.errors import DataError
from normkit.passes import (
    Data,
    Forward,
    changes_nothing,
    forward_batch,
    require_batches,
    uncompiled,
    untouched,
    unwrap,
)
from normkit.text import module_name

RECTIFIERS = frozenset({"relu", "relu_", "relu6"})
"""Names of the functions that return 0 for every value that is not positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivity:
    """Inactive channels of one ReLU.

    Args:
        name: The module that calls the ReLU, and the number of the call if that is above 1.
        num_channels: Channels of its input.
        num_eliminated: Channels without a positive value anywhere in the data.
        zero_share: Share of zeros in its output.
        largest_zero_share: Share of zeros in the channel with most zeros.
    """

    name: str
    num_channels: int
    num_eliminated: int
    zero_share: float
    largest_zero_share: float


@dataclass(frozen=True, kw_only=True)
class InactiveChannels(Measurement):
    """Channels that ReLUs set to zero in all of the data.

    Args:
        layers: A row for each ReLU, in the order of the forward.
        num_batches: Number of batches that were measured.
    """

    layers: tuple[LayerActivity, ...]
    num_batches: int

    drawn = ("zero_share", "largest_zero_share")

    @property
    def reading(self) -> str:
        """How many channels are off, and in which layer most."""
        dead, total = (
            sum(getattr(row, name) for row in self.layers)
            for name in ("num_eliminated", "num_channels")
        )
        if not dead:
            return f"None of the {total} rectified channels is off everywhere in the data."
        worst = max(self.layers, key=lambda row: row.num_eliminated)
        return (
            f"{dead} of {total} rectified channels ({100 * dead / total:.1f} %) are off everywhere "
            f"in the data, most of them in {worst.name} ({worst.num_eliminated} of "
            f"{worst.num_channels})."
        )


@changes_nothing
def inactive_channels(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None
) -> InactiveChannels:
    """Count the channels that each ReLU sets to zero in all of the data, and its share of zeros.

    A channel is eliminated if the ReLU's input has no positive value in it anywhere in the data.
    Every call of ``relu`` and ``relu6`` in a forward has a row, whether a module or a function is
    called. The model runs in evaluation mode and is left as it was.

    Channels are the second axis, ``(N, C, *S)``, because a ReLU does not know which axis holds
    them. For tokens ``(N, L, C)`` the counted "channels" are therefore positions.

    Args:
        model: Any model with ReLUs.
        batches: Inputs, pairs ``(inputs, target)`` or dicts of arguments.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.

    Returns:
        A row for each ReLU.

    Raises:
        DataError: If there is no batch, the model calls no ReLU, an input's second axis changes
            its size, or an input has NaN.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, section 6.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> found = inactive_channels(model, [torch.randn(4, 3, 8, 8)])
        >>> found.layers[0].name, found.layers[0].num_channels
        ('1', 8)
    """
    model = unwrap(model, "measure")
    data = Data(batches=batches, forward=forward or forward_batch)
    recorder, num_batches = Recorder(), 0
    with untouched(model, training=False), uncompiled(), torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            recorder.follow(name, module, stack)
        stack.enter_context(recorder)
        for batch in data.each(model, "measuring activations"):
            recorder.begin()
            data.forward(model, batch)
            num_batches += 1
    require_batches(num_batches)
    if recorder.uneven:
        raise DataError(
            f"the second axis of the input of {sorted(recorder.uneven)[0]} changes its size from "
            f"batch to batch, so it is no channel axis; give batches of one size"
        )
    if not recorder.activity:
        raise DataError(
            "no ReLU was called with a map: batches are empty, or the model has activations that "
            "are never exactly zero"
        )
    broken = [name for name, each in recorder.activity.items() if each.largest.isnan().any()]
    if broken:
        raise DataError(
            f"the input of {broken[0]} has NaN, which is neither positive nor not; look for it in "
            f"the batches, parameters and running statistics"
        )
    rows = [each.row(name) for name, each in recorder.activity.items()]
    return InactiveChannels(layers=tuple(rows), num_batches=num_batches)


class _ChannelActivity:
    """Number of zeros and the largest input in each channel of one ReLU."""

    def __init__(self, num_channels: int) -> None:
        self.zeros = torch.zeros(num_channels, dtype=torch.long)
        self.largest = torch.full((num_channels,), -torch.inf, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add one input of the ReLU."""
        channels = x.detach().transpose(0, 1).flatten(1)
        self.zeros += (channels <= 0).sum(dim=1).cpu()
        self.largest = torch.maximum(self.largest, channels.amax(dim=1).double().cpu())
        self.count += channels.shape[1]

    def row(self, name: str) -> LayerActivity:
        """Summarise all inputs in one row."""
        shares = self.zeros.double() / self.count
        return LayerActivity(
            name=name,
            num_channels=shares.numel(),
            num_eliminated=int((self.largest <= 0).sum()),
            zero_share=shares.mean().item(),
            largest_zero_share=shares.max().item(),
        )


class Recorder(TorchFunctionMode):
    """Records the input of every ReLU, together with the module that calls it.

    ``activity`` holds each ReLU's counts by its name in the report, and ``uneven`` the names of
    those whose second axis changes its size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activity: dict[str, _ChannelActivity] = {}
        self.uneven: set[str] = set()
        self._calls: Counter[str] = Counter()
        self._running: list[str] = []

    def follow(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        """Note when a module runs, until the stack is closed."""
        before = module.register_forward_pre_hook(lambda *_: self.enter(name))
        after = module.register_forward_hook(lambda *_: self.leave(), always_call=True)
        stack.callback(before.remove)
        stack.callback(after.remove)

    @property
    def is_inside(self) -> bool:
        """Whether a module is running."""
        return bool(self._running)

    def begin(self) -> None:
        """Reset the numbers of calls, because a new forward begins."""
        self._calls.clear()
        self._running.clear()

    def enter(self, name: str) -> None:
        """Note that a module begins to run."""
        self._running.append(name)

    def leave(self) -> None:
        """Note that the innermost running module has returned."""
        if self._running:
            self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RECTIFIERS and args and args[0].ndim > 1:
            self._note(args[0])
        return func(*args, **(kwargs or {}))

    def _note(self, x: Tensor) -> None:
        caller = self._running[-1] if self._running else ""
        self._calls[caller] += 1
        number = self._calls[caller]
        name = module_name(caller) + (f", call {number}" if number > 1 else "")
        if x.numel() == 0:
            return
        activity = self.activity.setdefault(name, _ChannelActivity(x.shape[1]))
        if x.shape[1] == activity.zeros.numel():
            activity.add(x)
        else:
            self.uneven.add(name)
