"""Which channel of one layer comes out where in another: values are exchanged for their number."""

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
"""Numbers below this are exact in every dtype."""

Labels = Mapping[nn.Module, Tensor]


def follow_channels(
    model: nn.Module,
    axes: Mapping[nn.Module, int],
    example_input: Any,  # noqa: ANN401
) -> Labels:
    """Find the numbers of the channels that each layer is given, from 1; 0 is none.

    Every one of the layers puts out the numbers of its channels instead of what it computes, so
    that a layer behind it, with nothing but moves in between, is given those. A forward that fails
    on such values shows what it has come to.

    Args:
        model: Left as it was; its hooks do not see these values.
        axes: The axis of the channels in each layer's output.
        example_input: What the model is called with.
    """
    runs: list[_Run] = []
    while not runs or max(run.size for run in runs) >= BASE ** len(runs):
        runs.append(_Run(axes, len(runs)))
        runs[-1].send(model, example_input)
    everywhere = [layer for layer in runs[0].seen if all(layer in run.seen for run in runs)]
    digits = {layer: [run.seen[layer] for run in runs] for layer in everywhere}
    return {layer: _joined(several) for layer, several in digits.items() if _alike(several)}


def _alike(digits: Sequence[Tensor]) -> bool:
    return len({each.shape for each in digits}) == 1


def _joined(digits: Sequence[Tensor]) -> Tensor:
    found = digits[0].to(torch.int32)
    for place, digit in enumerate(digits[1:], 1):
        found += digit.to(torch.int32) * BASE**place
    return found


def _digits(values: Tensor) -> Tensor:
    """Keep values that are digits in a byte each; 0 throughout if they are something else."""
    found = values.to(torch.int8)
    return found.cpu() if bool((found == values).all()) else torch.zeros_like(found, device="cpu")


class _Run:
    """One digit of the numbers, sent through once.

    Args:
        axes: The axis of the channels in each layer's output.
        digit: Which digit, from 0 for the last.
    """

    def __init__(self, axes: Mapping[nn.Module, int], digit: int) -> None:
        self.axes, self.digit = axes, digit
        self.seen: dict[nn.Module, Tensor] = {}
        self.size = 0

    def send(self, model: nn.Module, example_input: Any) -> None:  # noqa: ANN401
        """Call the model; what each layer is given at first is in ``seen`` afterwards."""
        with ExitStack() as stack:
            stack.enter_context(untouched(model))
            stack.enter_context(without_hooks(model))
            stack.enter_context(torch.no_grad())
            for layer in self.axes:
                stack.enter_context(replaced_forward(layer, partial(self._labelling, layer)))
            with suppress(Exception):  # the model's own code on values that are none of its own
                call_with(model, copied(example_input))

    def _labelling(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def labelled(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            x, y = next(iter((*args, *kwargs.values()))), forward(*args, **kwargs)
            if isinstance(x, Tensor):
                self.seen.setdefault(layer, _digits(x))
            return self._numbers(y, self.axes[layer]) if isinstance(y, Tensor) else y

        return labelled

    def _numbers(self, y: Tensor, axis: int) -> Tensor:
        """Exchange all values of a channel for its number."""
        if not -y.ndim <= axis < y.ndim:
            return y
        channels = y.movedim(axis, -1)
        numbers = torch.arange(1, channels.shape[-1] + 1, device=y.device)
        self.size = max(self.size, len(numbers))
        digits = (numbers // BASE**self.digit % BASE).to(y.dtype)
        return digits.expand(channels.shape).movedim(-1, axis).clone()


@contextmanager
def without_hooks(model: nn.Module) -> Generator[None]:
    """Run the block without the hooks of a model's forwards."""
    kept = [(vars(m), name, vars(m)[name]) for m in model.modules() for name in HOOKS]
    try:
        for own, name, _ in kept:
            own[name] = OrderedDict()
        yield
    finally:
        for own, name, hooks in kept:
            own[name] = hooks


def sources(labels: Tensor | None, axis: int) -> Tensor | None:
    """Find for each channel of a layer's input from which one it comes; None if from several.

    Args:
        labels: Numbers from 1 that the layer was given, if it was given any.
        axis: Of its channels.
    """
    rows = _rows(labels, axis)
    if rows is None or not rows.numel():
        return None
    first = rows[:, 0]
    same = (rows == first[:, None]).all() and (first >= 1).all()
    return (first.long() - 1) if same else None


def destinations(labels: Tensor | None, axis: int, num_channels: int) -> Tensor | None:
    """Find for each channel into which one of a layer's input it comes; None if into several.

    Args:
        labels: Numbers from 1 that the layer was given, if it was given any.
        axis: Of its channels.
        num_channels: How many there are of those that were numbered.
    """
    rows = _rows(labels, axis)
    if rows is None or not rows.numel() or not 1 <= rows.min() <= rows.max() <= num_channels:
        return None
    whose = rows.flatten().long() - 1
    into = torch.arange(rows.shape[0])[:, None].expand(rows.shape).flatten()
    none = torch.full((num_channels,), -1)
    first = none.scatter_reduce(0, whose, into, "amin", include_self=False)
    last = none.scatter_reduce(0, whose, into, "amax", include_self=False)
    once = torch.equal(first, last) and bool((first >= 0).all())
    return first if once else None


def _rows(labels: Tensor | None, axis: int) -> Tensor | None:
    """Numbers channel by channel; None if there is no such axis."""
    if labels is None or not -labels.ndim <= axis < labels.ndim:
        return None
    return labels.movedim(axis, 0).flatten(1) if labels.ndim > 1 else labels[:, None]
