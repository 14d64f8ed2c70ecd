"""Batches: which forms are accepted, and how a batch is sent through a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normkit.errors import DataError

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, batch)`` returns the model's output.

Users pass one for batches of a form that ``forward_batch`` does not know.
"""


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Send a batch through a model: inputs, ``(inputs, target)``, or named arguments.

    Inputs are a tensor, a list of tensors (as detection models take), or a dict of named arguments.
    Of a dict, only the entries that the model's ``forward`` has an argument for are sent. A model
    that takes a list of tensors also gets the target in training mode.

    Raises:
        DataError: If the batch has another form, or the model takes other arguments; the way out
            is ``forward=``.

    Example:
        >>> forward_batch(nn.Flatten(), (torch.zeros(2, 3, 4), torch.tensor([0, 1]))).shape
        torch.Size([2, 12])
    """
    args, named = arguments_of(model, batch)
    if not args or isinstance(args[0], Tensor):
        return model(*args, **named)
    try:
        return model(*args)
    except (TypeError, AttributeError) as error:
        raise DataError(
            f"{type(model).__name__} was called with the batch's list of {len(args[0])} tensors, "
            f"and does not accept it ({error}); pass forward=lambda model, batch: model(...)"
        ) from error


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments with which to call a model for a batch.

    Raises:
        DataError: If the batch has an unknown form, or does not fit the model's forward.
    """
    args, named = _split(model, batch)
    try:
        inspect.signature(model.forward).bind(*args, **named)
    except TypeError as error:
        raise DataError(
            f"{_described(batch)} was given; {type(model).__name__} would be called with "
            f"{', '.join(named) or 'the inputs alone'}, but its forward takes "
            f"{', '.join(_names(model)) or 'nothing'} ({error}); pass "
            f"forward=lambda model, batch: model(...)"
        ) from error
    return args, named


def _split(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a batch into positional and keyword arguments, without checking the forward."""
    if isinstance(batch, Tensor) or (_is_list_of_tensors(batch) and _takes_list(model)):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), _named(model, batch)
    first = batch[0] if isinstance(batch, tuple | list) and batch else None
    if isinstance(first, Tensor):
        return (first,), {}
    if isinstance(first, Mapping):
        return (), _named(model, first)
    if _is_list_of_tensors(first):
        with_target = model.training and len(batch) > 1 and len(_names(model)) > 1
        return (first, *batch[1:2]) if with_target else (first,), {}
    raise DataError(
        f"{_described(batch)} was given; a batch must be a tensor, a pair (inputs, target), or a "
        f"dict of arguments, where inputs may be a list of images; for other forms pass "
        f"forward=lambda model, batch: ..."
    )


def _named(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Select the entries of a dict that the model's forward has an argument for.

    Raises:
        DataError: If there is none.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    names = _names(model)
    found = {name: batch[name] for name in names if name in batch}
    if not found:
        raise DataError(
            f"a batch with the entries {sorted(map(str, batch))} was given, but the model's "
            f"forward takes {names}; pass forward=lambda model, batch: model(batch[...])"
        )
    return found


def _names(model: nn.Module) -> list[str]:
    """Names of the arguments that a model's forward takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _takes_list(model: nn.Module) -> bool:
    """Whether the first argument of a forward is annotated as a list, as in detection models."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return bool(parameters) and "list[" in str(parameters[0].annotation).lower()


def _is_list_of_tensors(given: Any) -> bool:
    is_list = isinstance(given, tuple | list) and bool(given)
    return is_list and all(isinstance(each, Tensor) for each in given)


def _described(batch: Any) -> str:
    kinds = [type(each).__name__ for each in batch] if isinstance(batch, tuple | list) else ()
    return f"a batch of type {type(batch).__name__}" + (
        f" ({', '.join(kinds[:5])})" if kinds else ""
    )


def moved(batch: Any, device: torch.device | None) -> Any:
    """Return a batch with all of its tensors on a device; None leaves them where they are.

    Objects that torch's pytree does not know are moved by their own ``to`` method if they have one,
    as batches of tokenizers do.
    """
    return batch if device is None else tree_map(partial(_moved, device), batch)


def _moved(device: torch.device, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(device, non_blocking=True)
    if callable(to := getattr(leaf, "to", None)):
        return to(device)
    if isinstance(leaf, Mapping):
        return {key: moved(value, device) for key, value in leaf.items()}
    return leaf


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's first parameter or buffer, or None if it has neither."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def num_examples(batch: Any) -> int | None:
    """Count the examples of a batch, or return None if it contains no tensor with an axis.

    A list of input tensors counts its elements; other batches count along axis 0 of their first
    tensor.

    Example:
        >>> num_examples([torch.zeros(8, 3), torch.zeros(8)]), num_examples({"x": torch.zeros(5)})
        (8, 5)
        >>> num_examples(([torch.zeros(3, 6, 6), torch.zeros(3, 8, 7)], None))  # two images
        2
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if _is_list_of_tensors(inputs):
        return len(inputs)
    leaves = tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else batch)
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    return None if first is None or first.ndim == 0 else first.shape[0]


def as_list(batches: Iterable[Any], name: str = "batches") -> list[Any]:
    """Read all batches into a list, so that several passes use the same ones.

    Args:
        batches: An iterable of batches, which is read once.
        name: Name of the user's argument, for error texts.

    Raises:
        DataError: If there is no batch, or a tensor is given where batches are expected.
    """
    found = list(iterate(batches, name))
    require_batches(len(found), name)
    return found


def require_batches(number: int, name: str = "batches") -> None:
    """Refuse an iterable that gave no batch.

    Raises:
        DataError: If the number of batches is 0.
    """
    if number == 0:
        raise DataError(
            f"{name}= gave no batch; an iterator that was used up must be created again"
        )


def iterate(batches: Iterable[Any], name: str = "batches") -> Iterator[Any]:
    """Iterate over batches; a tensor is refused, because that would iterate over its first axis.

    Raises:
        DataError: If ``batches`` is a tensor or not iterable.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        shape = f" of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else ""
        raise DataError(
            f"a {type(batches).__name__}{shape} was given as {name}=; it must be an iterable of "
            f"batches, such as a DataLoader or [inputs]"
        )
    return iter(batches)
