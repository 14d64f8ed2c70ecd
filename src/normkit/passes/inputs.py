"""The inputs of chosen layers of a model, without running the rest of the forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.passes.batches import Forward, device_of, forward_batch, moved

OnInput = Callable[..., None]
"""Callback that gets an input of a layer, and for some layers the mask of its valid positions."""
WatchLayer = Callable[[nn.Module, OnInput], AbstractContextManager[None]]
"""``watch(layer, on_input)`` calls ``on_input`` with each input of a layer while its block runs."""


class _StopForward(BaseException):
    """Ends a forward early. Not an ``Exception``, so the model's own handlers do not catch it."""


@contextmanager
def watch_entry(layer: nn.Module, on_input: OnInput) -> Generator[None]:
    """Pass the first argument of every call of a layer to ``on_input``, after its other hooks."""

    def hook(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        on_input(first_argument(args, named))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_argument(args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Return the first positional or else the first keyword argument; None if there is none."""
    return args[0] if args else next(iter(named.values()), None)


def first_calls(
    model: nn.Module,
    layers: Collection[nn.Module],
    batch: Any,
    forward: Forward = forward_batch,
    watch: WatchLayer = watch_entry,
) -> dict[nn.Module, int]:
    """Count the calls of each layer in one forward, in the order of the layers' first calls.

    Args:
        model: The model; its mode is not changed, see ``untouched``.
        layers: Layers of the model. The result omits those that are not called.
        batch: The batch to send through the model.
        forward: Sends the batch through the model.
        watch: Reports each call of a layer.
    """
    calls: dict[nn.Module, int] = {}

    def count(layer: nn.Module, *_: Any) -> None:
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
) -> Iterator[Tensor]:
    """Iterate over the inputs of a layer, batch by batch; each forward stops at its last call.

    An input is the first argument of the layer's own forward, after all pre-forward hooks.

    Args:
        model: The model; its mode is not changed, see ``untouched``.
        layer: The layer.
        batches: The batches to send through the model.
        num_calls: How often one forward calls the layer; see ``first_calls``. 0 if that varies:
            every forward then runs to its end.
        forward: Sends a batch through the model.
    """
    for batch in batches:
        seen: list[Tensor] = []

        def keep(x: Tensor, seen: list[Tensor] = seen) -> None:
            # Copy all but the last input: the layer may modify its input in place when it runs.
            seen.append(x if len(seen) + 1 == num_calls else x.clone())

        show_inputs(model, layer, (batch,), keep, ForwardUntil(num_calls, forward))
        yield from seen


class ForwardUntil(NamedTuple):
    """How to send a batch through a model up to a call of one layer.

    Args:
        num_calls: The forward stops at this call of the layer; 0 lets it run to its end.
        forward: Sends a batch through the model.
        watch: Reports each call of the layer.
    """

    num_calls: int
    forward: Forward = forward_batch
    watch: WatchLayer = watch_entry


def show_inputs(
    model: nn.Module,
    layer: nn.Module,
    batches: Iterable[Any],
    on_input: OnInput,
    until: ForwardUntil,
) -> None:
    """Pass every input of a layer to ``on_input``, batch by batch, before the layer uses it."""
    for batch in batches:
        num_seen = 0

        def count(*given: Any) -> None:
            nonlocal num_seen
            num_seen += 1
            on_input(*given)
            if num_seen == until.num_calls:
                raise _StopForward

        try:
            with until.watch(layer, count), torch.no_grad():
                until.forward(model, moved(batch, device_of(model)))
        except _StopForward:
            pass
