"""What goes into chosen layers of a model, without the rest of the forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from normkit.passes.batches import Forward, device_of, forward_batch, moved


class _Reached(BaseException):
    """Ends a forward at the layer that was asked for; no ``except Exception`` takes it."""


def first_calls(
    model: nn.Module,
    layers: Collection[nn.Module],
    batch: Any,  # noqa: ANN401
    forward: Forward = forward_batch,
) -> dict[nn.Module, int]:
    """Find how often each layer is called in one forward, in the order of their first calls.

    Args:
        model: The model, in the mode that it is in; see ``untouched``.
        layers: Layers of it; those that are not called are not in the result.
        batch: What is sent through it.
        forward: How.
    """
    calls: dict[nn.Module, int] = {}

    def count(layer: nn.Module, args: Any) -> None:  # noqa: ANN401
        calls[layer] = calls.get(layer, 0) + 1

    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(count).remove)
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
        collect = _collector(seen, num_calls)
        handle = layer.register_forward_pre_hook(collect, with_kwargs=True)
        try:
            with torch.no_grad():
                forward(model, moved(batch, device_of(model)))
        except _Reached:
            pass
        finally:
            handle.remove()
        yield from seen


def _collector(seen: list[Tensor], num_calls: int) -> Callable[..., None]:
    def collect(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named.values()))
        last = len(seen) + 1 == num_calls
        seen.append(x if last else x.clone())  # what comes after may write into it
        if last:
            raise _Reached

    return collect
