"""What goes into chosen layers of a model, without the rest of the forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.passes.batches import Forward, device_of, forward_batch, moved

See = Callable[[Tensor], None]
Watch = Callable[[nn.Module, See], AbstractContextManager[None]]
"""``watch(layer, see)`` shows ``see`` what goes into a layer, as long as its block runs."""


class _Reached(BaseException):
    """Ends a forward at the layer that was asked for; no ``except Exception`` takes it."""


@contextmanager
def at_entry(layer: nn.Module, see: See) -> Generator[None]:
    """Show the first argument of every call of a layer, after all of its other hooks."""

    def show(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(first_argument(args, named))

    handle = layer.register_forward_pre_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_argument(args: Sequence[Any], named: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """What a module is called with first, by place or by name; None if with nothing."""
    return args[0] if args else next(iter(named.values()), None)


def first_calls(
    model: nn.Module,
    layers: Collection[nn.Module],
    batch: Any,  # noqa: ANN401
    forward: Forward = forward_batch,
    watch: Watch = at_entry,
) -> dict[nn.Module, int]:
    """Find how often each layer is called in one forward, in the order of their first calls.

    Args:
        model: The model, in the mode that it is in; see ``untouched``.
        layers: Layers of it; those that are not called are not in the result.
        batch: What is sent through it.
        forward: How.
        watch: What counts as a call.
    """
    calls: dict[nn.Module, int] = {}

    def count(layer: nn.Module, _x: Any) -> None:  # noqa: ANN401
        calls[layer] = calls.get(layer, 0) + 1

    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.enter_context(watch(layer, partial(count, layer)))
        forward(model, moved(batch, device_of(model)))
    return calls


def inputs_of(
    model: nn.Module,
    layer: nn.Module,
    batches: Iterable[Any],
    num_calls: int,
    forward: Forward = forward_batch,
    watch: Watch = at_entry,
) -> Iterator[Tensor]:
    """Give every input of a layer, batch for batch; each forward ends at the layer's last call.

    Args:
        model: The model, in the mode that it is in; see ``untouched``.
        layer: The layer whose inputs are given.
        batches: What is sent through the model.
        num_calls: How often a forward calls the layer; see ``first_calls``. 0 if that varies:
            forwards then run to their end.
        forward: How a batch is sent through the model.
        watch: What an input is; by default the first argument of the layer's own forward.
    """
    for batch in batches:
        seen: list[Tensor] = []
        try:
            with watch(layer, _collector(seen, num_calls)), torch.no_grad():
                forward(model, moved(batch, device_of(model)))
        except _Reached:
            pass
        yield from seen


def _collector(seen: list[Tensor], num_calls: int) -> See:
    def collect(x: Tensor) -> None:
        last = len(seen) + 1 == num_calls
        seen.append(x if last else x.clone())  # what comes after may write into it
        if last:
            raise _Reached

    return collect
