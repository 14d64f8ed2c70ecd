"""What a batch is, and how it goes through a model."""

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
"""``forward(model, batch)`` gives the model's output for a batch that ``forward_batch`` cannot."""


def forward_batch(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    """Send a batch through a model: inputs, ``(inputs, target)``, or named arguments.

    Inputs are a tensor, a list of tensors, as detectors take them, or a dict of named arguments, of
    which those are sent whose names the model's ``forward`` takes. In training mode a model that
    takes a list of tensors is given the target as well.

    Raises:
        DataError: If it is none of these, or the model takes other arguments; the way out is
            ``forward=``.

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
            f"{type(model).__name__} was given the batch's list of {len(args[0])} tensors, and "
            f"does not take it ({error}); pass forward=lambda model, batch: model(...)"
        ) from error


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    """What a model is called with for a batch, by place and by name.

    Raises:
        DataError: If the batch has another form, or does not fit the model's forward.
    """
    args, named = _given(model, batch)
    try:
        inspect.signature(model.forward).bind(*args, **named)
    except TypeError as error:
        raise DataError(
            f"{_described(batch)} was given, of which {type(model).__name__} gets "
            f"{_listed(named) or 'the inputs alone'}, and its forward takes "
            f"{_listed(_names(model)) or 'nothing'} ({error}); pass "
            f"forward=lambda model, batch: model(...)"
        ) from error
    return args, named


def _given(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
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
        f"{_described(batch)} was given; a batch is a tensor, a pair (inputs, target), or a dict "
        f"of arguments, and inputs may be a list of images; for others pass "
        f"forward=lambda model, batch: ..."
    )


def _named(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries of a dict that a model's forward takes.

    Raises:
        DataError: If it takes none of them.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    names = _names(model)
    found = {name: batch[name] for name in names if name in batch}
    if not found:
        raise DataError(
            f"a batch with the entries {sorted(map(str, batch))} was given, and the model takes "
            f"{names}; pass forward=lambda model, batch: model(batch[...])"
        )
    return found


def _names(model: nn.Module) -> list[str]:
    """Names of the arguments that a model's forward takes."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _takes_list(model: nn.Module) -> bool:
    """Whether a forward says that its first argument is a list of tensors, as detectors' do."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return bool(parameters) and "list[" in str(parameters[0].annotation).lower()


def _is_list_of_tensors(given: Any) -> bool:  # noqa: ANN401
    is_list = isinstance(given, tuple | list) and bool(given)
    return is_list and all(isinstance(each, Tensor) for each in given)


def _described(batch: Any) -> str:  # noqa: ANN401
    kinds = [type(each).__name__ for each in batch] if isinstance(batch, tuple | list) else ()
    return f"a batch of type {type(batch).__name__}" + (
        f" ({', '.join(kinds[:5])})" if kinds else ""
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def moved(batch: Any, device: torch.device | None) -> Any:  # noqa: ANN401
    """Return a batch with all of its tensors on a device.

    What torch does not look into moves itself if it has a ``to``, as tokenizers' batches do.
    """
    return batch if device is None else tree_map(partial(_moved, device), batch)


def _moved(device: torch.device, leaf: Any) -> Any:  # noqa: ANN401
    if isinstance(leaf, Tensor):
        return leaf.to(device, non_blocking=True)
    if callable(to := getattr(leaf, "to", None)):
        return to(device)
    if isinstance(leaf, Mapping):
        return {key: moved(value, device) for key, value in leaf.items()}
    return leaf


def device_of(model: nn.Module) -> torch.device | None:
    """Device of a model's first parameter or buffer; None if it has neither."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def num_examples(batch: Any) -> int | None:  # noqa: ANN401
    """Length of a batch's list of inputs, or of its first tensor's first axis; None without.

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
