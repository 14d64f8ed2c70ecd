"""Finding which channel of one layer becomes which channel of another.

Every layer's output is replaced by the numbers of its channels, so that the input of the next layer
shows from which channels it comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.passes import call_with, copied, replaced_forward, untouched

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BASE = 128
"""Base of the digits in which channel numbers are sent; every dtype represents them exactly."""

Labels = Mapping[nn.Module, Tensor]
"""For each layer, its input with channel numbers in place of values."""


def follow_channels(
    model: nn.Module,
    axes: Mapping[nn.Module, int],
    example_input: Any,
) -> Labels:
    """Find, for each layer, the channel numbers that arrive in its input.

    Each of the layers outputs the numbers of its channels, counted from 1, instead of its values.
    If only moves come in between, the next layer gets these numbers. 0 stands for values that are
    no channel numbers. If the forward fails on such values, the result covers the layers before the
    failure.

    Args:
        model: The model; it is not changed, and its hooks are not called.
        axes: The axis of the channels in each layer's output.
        example_input: The input with which to call the model.
    """
    runs: list[_Run] = []
    while not runs or max(run.size for run in runs) >= BASE ** len(runs):
        runs.append(_Run(axes, len(runs)))
        runs[-1].send(model, example_input)
    in_all_runs = [layer for layer in runs[0].seen if all(layer in run.seen for run in runs)]
    digits = {layer: [run.seen[layer] for run in runs] for layer in in_all_runs}
    return {
        layer: _joined(several)
        for layer, several in digits.items()
        if len({each.shape for each in several}) == 1
    }


def _joined(digits: Sequence[Tensor]) -> Tensor:
    """Combine the digits of the numbers, lowest first."""
    found = digits[0].to(torch.int32)
    for place, digit in enumerate(digits[1:], 1):
        found += digit.to(torch.int32) * BASE**place
    return found


def _digits(values: Tensor) -> Tensor:
    """Cast digits to int8; if any value is not a digit, return zeros."""
    found = values.to(torch.int8)
    return found.cpu() if bool((found == values).all()) else torch.zeros_like(found, device="cpu")


class _Run:
    """One forward in which every layer outputs one digit of its channel numbers.

    Args:
        axes: The axis of the channels in each layer's output.
        digit: Which digit, where 0 is the lowest.
    """

    def __init__(self, axes: Mapping[nn.Module, int], digit: int) -> None:
        self.axes, self.digit = axes, digit
        self.seen: dict[nn.Module, Tensor] = {}
        self.size = 0

    def send(self, model: nn.Module, example_input: Any) -> None:
        """Call the model; afterwards ``seen`` has the input of each layer's first call."""
        with ExitStack() as stack:
            stack.enter_context(untouched(model))
            stack.enter_context(without_hooks(model))
            stack.enter_context(torch.no_grad())
            for layer in self.axes:
                stack.enter_context(replaced_forward(layer, partial(self._labelling, layer)))
            with suppress(Exception):  # the model's code may fail on values that it does not expect
                call_with(model, copied(example_input))

    def _labelling(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def labelled(*args: Any, **kwargs: Any) -> Any:
            x, y = next(iter((*args, *kwargs.values()))), forward(*args, **kwargs)
            if isinstance(x, Tensor):
                self.seen.setdefault(layer, _digits(x))
            return self._numbers(y, self.axes[layer]) if isinstance(y, Tensor) else y

        return labelled

    def _numbers(self, y: Tensor, axis: int) -> Tensor:
        """Replace all values of each channel by a digit of the channel's number."""
        if not -y.ndim <= axis < y.ndim:
            return y
        channels = y.movedim(axis, -1)
        numbers = torch.arange(1, channels.shape[-1] + 1, device=y.device)
        self.size = max(self.size, len(numbers))
        digits = (numbers // BASE**self.digit % BASE).to(y.dtype)
        return digits.expand(channels.shape).movedim(-1, axis).clone()


@contextmanager
def without_hooks(model: nn.Module) -> Generator[None]:
    """Run the block without the forward hooks of a model."""
    kept = [(vars(m), name, vars(m)[name]) for m in model.modules() for name in HOOKS]
    try:
        for own, name, _ in kept:
            own[name] = OrderedDict()
        yield
    finally:
        for own, name, hooks in kept:
            own[name] = hooks


def sources(labels: Tensor | None, axis: int) -> Tensor | None:
    """Find, for each channel of a layer's input, the channel from which all its values come.

    Args:
        labels: The channel numbers, from 1, in the layer's input; None if there are none.
        axis: The axis of the input's channels.

    Returns:
        Indices from 0; None if a channel's values come from several channels or are unknown.
    """
    rows = _rows(labels, axis)
    if rows is None or not rows.numel():
        return None
    first = rows[:, 0]
    same = (rows == first[:, None]).all() and (first >= 1).all()
    return (first.long() - 1) if same else None


def destinations(labels: Tensor | None, axis: int, num_channels: int) -> Tensor | None:
    """Find, for each numbered channel, the channel of a layer's input that gets all its values.

    Args:
        labels: The channel numbers, from 1, in the layer's input; None if there are none.
        axis: The axis of the input's channels.
        num_channels: Number of channels that were numbered.

    Returns:
        Indices from 0; None if a channel's values go into several channels or are unknown.
    """
    rows = _rows(labels, axis)
    if rows is None or not rows.numel() or not 1 <= rows.min() <= rows.max() <= num_channels:
        return None
    source = rows.flatten().long() - 1
    target = torch.arange(rows.shape[0])[:, None].expand(rows.shape).flatten()
    unknown = torch.full((num_channels,), -1)
    first = unknown.scatter_reduce(0, source, target, "amin", include_self=False)
    last = unknown.scatter_reduce(0, source, target, "amax", include_self=False)
    is_unique = torch.equal(first, last) and bool((first >= 0).all())
    return first if is_unique else None


def _rows(labels: Tensor | None, axis: int) -> Tensor | None:
    """Arrange the numbers as one row for each channel; None if the axis does not exist."""
    if labels is None or not -labels.ndim <= axis < labels.ndim:
        return None
    return labels.movedim(axis, 0).flatten(1) if labels.ndim > 1 else labels[:, None]
