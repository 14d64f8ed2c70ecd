"""What goes into chosen layers of a model, without the rest of the forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.passes.batches import Forward, device_of, forward_batch, moved

See = Callable[..., None]
"""Gets an input of a layer, and sometimes which of its positions are valid."""
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

    def count(layer: nn.Module, *_: Any) -> None:  # noqa: ANN401
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
    """Give every input of a layer, batch for batch; each forward ends at the layer's last call.

    An input is what the layer's own forward gets, after all of its other hooks.

    Args:
        model: The model, in the mode that it is in; see ``untouched``.
        layer: The layer whose first argument is given.
        batches: What is sent through the model.
        num_calls: How often a forward calls the layer; see ``first_calls``. 0 if that varies:
            forwards then run to their end.
        forward: How a batch is sent through the model.
    """
    for batch in batches:
        seen: list[Tensor] = []

        def keep(x: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(x if len(seen) + 1 == num_calls else x.clone())  # may be written into

        show_inputs(model, layer, (batch,), keep, Until(num_calls, forward))
        yield from seen


class Until(NamedTuple):
    """How a batch is sent through a model, and how far.

    Args:
        num_calls: Ends a forward at this call of the layer; 0 lets it run to its end.
        forward: How a batch is sent.
        watch: What counts as a call.
    """

    num_calls: int
    forward: Forward = forward_batch
    watch: Watch = at_entry


def show_inputs(
    model: nn.Module, layer: nn.Module, batches: Iterable[Any], see: See, until: Until
) -> None:
    """Show every input of a layer, batch for batch, before the layer works on it."""
    for batch in batches:
        num_seen = 0

        def shown(*given: Any) -> None:  # noqa: ANN401
            nonlocal num_seen
            num_seen += 1
            see(*given)
            if num_seen == until.num_calls:
                raise _Reached

        try:
            with until.watch(layer, shown), torch.no_grad():
                until.forward(model, moved(batch, device_of(model)))
        except _Reached:
            pass
