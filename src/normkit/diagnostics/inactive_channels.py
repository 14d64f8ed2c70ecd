"""Elimination singularities: channels that an activation has switched off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
"""Functions that give 0 for everything that is not positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivity:
    """What one activation lets through.

    Args:
        name: The module that calls it, and which of its calls it is, if there are several.
        num_channels: Channels of its input.
        num_eliminated: Channels that are not positive anywhere in the data.
        zero_share: Share of zeros in its output.
        largest_zero_share: Of the channel that has most.
    """

    name: str
    num_channels: int
    num_eliminated: int
    zero_share: float
    largest_zero_share: float


@dataclass(frozen=True, kw_only=True)
class InactiveChannels(Measurement):
    """Channels that activations have switched off.

    Args:
        layers: Activations in the order of the forward.
        num_batches: Batches that were measured.
    """

    layers: tuple[LayerActivity, ...]
    num_batches: int

    drawn = ("zero_share", "largest_zero_share")

    @property
    def reading(self) -> str:
        """How many channels are off, and where most."""
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
    """Count the channels that ReLU switches off, and the zeros that it makes.

    A channel is eliminated when its input to the activation is not positive anywhere in the data.
    Every ``relu`` and ``relu6`` is seen, called as a module or as a function, one row for each
    call of a forward. The model runs at evaluation and is left as it was.

    Channels are the second axis, ``(N, C, *S)``: an activation does not say which axis it is. Of
    tokens ``(N, L, C)`` the rows are therefore positions.

    Args:
        model: Any model with ReLUs.
        batches: Inputs, ``(inputs, target)`` or dicts of arguments.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        A row for each activation.

    Raises:
        DataError: If there is no batch, the model calls no ReLU, or one gets NaN.

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
            stack.callback(recorder.follow(name, module))
        stack.enter_context(recorder)
        for batch in data.each(model, "measuring activations"):
            recorder.begin()
            data.forward(model, batch)
            num_batches += 1
    require_batches(num_batches)
    if recorder.uneven:
        raise DataError(
            f"the second axis of the input of {sorted(recorder.uneven)[0]} changes its size from "
            f"batch to batch, so it does not count channels; give batches of one size"
        )
    if not recorder.seen:
        raise DataError(
            "no ReLU was called with a map: batches are empty, or the model has activations that "
            "are never exactly zero"
        )
    broken = [name for name, seen in recorder.seen.items() if seen.largest.isnan().any()]
    if broken:
        raise DataError(
            f"the input of {broken[0]} has NaN, which is neither positive nor not; look for it in "
            f"the batches, parameters and running statistics"
        )
    rows = [seen.row(name) for name, seen in recorder.seen.items()]
    return InactiveChannels(layers=tuple(rows), num_batches=num_batches)


class _Seen:
    """Zeros and the largest input of each channel of one activation."""

    def __init__(self, num_channels: int) -> None:
        self.zeros = torch.zeros(num_channels, dtype=torch.long)
        self.largest = torch.full((num_channels,), -torch.inf, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take the input of the activation into account."""
        channels = x.detach().transpose(0, 1).flatten(1)
        self.zeros += (channels <= 0).sum(dim=1).cpu()
        self.largest = torch.maximum(self.largest, channels.amax(dim=1).double().cpu())
        self.count += channels.shape[1]

    def row(self, name: str) -> LayerActivity:
        shares = self.zeros.double() / self.count
        return LayerActivity(
            name=name,
            num_channels=shares.numel(),
            num_eliminated=int((self.largest <= 0).sum()),
            zero_share=shares.mean().item(),
            largest_zero_share=shares.max().item(),
        )


class Recorder(TorchFunctionMode):
    """Sees every rectifier, and knows which module calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, _Seen] = {}
        self.uneven: set[str] = set()
        self.calls: Counter[str] = Counter()
        self._inside: list[str] = []

    def follow(self, name: str, module: nn.Module) -> Callable[[], None]:
        """Note when a module runs; return how that ends."""

        def before_it(_module: nn.Module, _args: Any) -> None:  # noqa: ANN401
            self.enter(name)

        def after_it(_module: nn.Module, _args: Any, _output: Any) -> None:  # noqa: ANN401
            self.leave()

        before = module.register_forward_pre_hook(before_it)
        after = module.register_forward_hook(after_it, always_call=True)

        def end() -> None:
            before.remove()
            after.remove()

        return end

    @property
    def is_inside(self) -> bool:
        """Whether a module runs."""
        return bool(self._inside)

    def begin(self) -> None:
        """Count calls anew: a forward begins."""
        self.calls.clear()
        self._inside.clear()

    def enter(self, name: str) -> None:
        """Note that a module runs from here on."""
        self._inside.append(name)

    def leave(self) -> None:
        """Note that the module that ran last is done."""
        if self._inside:
            self._inside.pop()

    def __torch_function__(  # what torch calls, with whatever a function takes
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if getattr(func, "__name__", "") in RECTIFIERS and args and args[0].ndim > 1:
            self._note(args[0])
        return func(*args, **(kwargs or {}))

    def _note(self, x: Tensor) -> None:
        place = self._inside[-1] if self._inside else ""
        self.calls[place] += 1
        number = self.calls[place]
        name = module_name(place) + (f", call {number}" if number > 1 else "")
        if x.numel() == 0:
            return
        seen = self.seen.setdefault(name, _Seen(x.shape[1]))
        if x.shape[1] == seen.zeros.numel():
            seen.add(x)
        else:
            self.uneven.add(name)
