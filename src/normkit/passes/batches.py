"""What a batch is, and how it goes through a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normkit.errors import DataError

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, batch)`` gives the model's output for a batch that ``forward_batch`` cannot."""


def forward_batch(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    """Send a batch through a model: inputs, ``(inputs, target)``, or a dict of named arguments.

    Of a dict, those entries are sent whose names the model's ``forward`` takes.

    Raises:
        DataError: If it is none of these; the way out is ``forward=``.

    Example:
        >>> forward_batch(nn.Flatten(), (torch.zeros(2, 3, 4), torch.tensor([0, 1]))).shape
        torch.Size([2, 12])
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return model(batch[0])
    if isinstance(batch, Mapping):
        return model(**arguments_of(model, batch))
    raise DataError(
        f"a batch of type {type(batch).__name__} was given; a batch is a tensor, a pair "
        f"(inputs, target) or a dict of arguments; for others pass forward=lambda model, batch: ..."
    )


def arguments_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries of a dict that a model's forward takes.

    Raises:
        DataError: If it takes none of them.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    named = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found = {name: batch[name] for name in named if name in batch}
    if not found:
        raise DataError(
            f"a batch with the entries {sorted(map(str, batch))} was given, and the model takes "
            f"{named}; pass forward=lambda model, batch: model(batch[...])"
        )
    return found


def moved(batch: Any, device: torch.device | None) -> Any:  # noqa: ANN401
    """Return a batch with all of its tensors on a device."""
    if device is None:
        return batch
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def device_of(model: nn.Module) -> torch.device | None:
    """Device of a model's first parameter or buffer; None if it has neither."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def num_examples(batch: Any) -> int | None:  # noqa: ANN401
    """Length of the first axis of a batch's first tensor; None if it has none.

    Example:
        >>> num_examples([torch.zeros(8, 3), torch.zeros(8)]), num_examples({"x": torch.zeros(5)})
        (8, 5)
    """
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    return None if first is None or first.ndim == 0 else first.shape[0]


def as_list(batches: Iterable[Any], name: str = "batches") -> list[Any]:
    """Read all batches, once, so that every pass sees the same.

    Args:
        batches: What is read.
        name: What the user calls it.

    Raises:
        DataError: If there is none, or a tensor is given where batches are expected.
    """
    found = list(iterate(batches, name))
    require_batches(len(found), name)
    return found


def require_batches(number: int, name: str = "batches") -> None:
    """Refuse that there was nothing.

    Raises:
        DataError: If there was no batch.
    """
    if number == 0:
        raise DataError(f"{name}= gave no batch; an iterator that was used up has to be made anew")


def iterate(batches: Iterable[Any], name: str = "batches") -> Iterator[Any]:
    """Go through batches; a tensor is refused, whose first axis would be taken for them.

    Raises:
        DataError: If it is a tensor or cannot be gone through.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        shape = f" of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else ""
        raise DataError(
            f"a {type(batches).__name__}{shape} was given as {name}=; it is an iterable of "
            f"batches, such as a DataLoader or [inputs]"
        )
    return iter(batches)
