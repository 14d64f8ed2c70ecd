"""One forward of a model: its output, and how often its layers are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from normkit.passes import call_with, copied, untouched


class Seen(NamedTuple):
    """A model's output, and how often some of its layers were called."""

    output: Any
    calls: Counter[nn.Module]


def run(model: nn.Module, example_input: Any, layers: Collection[nn.Module] = ()) -> Seen:  # noqa: ANN401
    """Send the example input through a model in its mode; twice in a row draws the same numbers.

    Args:
        model: Left as it was.
        example_input: A tuple of arguments, a dict of named ones, or the only one.
        layers: Whose calls are counted.
    """
    calls: Counter[nn.Module] = Counter()
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.no_grad())
        for layer in layers:
            stack.callback(layer.register_forward_hook(_counting(calls)).remove)
        return Seen(call_with(model, copied(example_input)), calls)


def _counting(calls: Counter[nn.Module]) -> Callable[..., None]:
    def count(layer: nn.Module, _args: Any, _output: Any) -> None:  # noqa: ANN401
        calls[layer] += 1

    return count


def difference(before: Any, after: Any) -> float | None:  # noqa: ANN401
    r"""Compare two outputs of any structure: the largest error over the largest value.

    .. math::  \max_t \max_i |a_{ti} - b_{ti}| / \max_i |a_{ti}|

    over the floating-point tensors ``t`` where ``a`` is finite. None if there are none, nothing in
    them is finite, or their shapes differ.
    """
    (first, one), (second, two) = tree_flatten(before), tree_flatten(after)
    if one != two:
        return None
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if _is_compared(a)]
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    found = [_relative(_wide(a), _wide(b)) for a, b in pairs]
    return max((each for each in found if each is not None), default=None)


def tolerance(output: Any) -> float:  # noqa: ANN401
    """Say what difference is still rounding, in the coarsest dtype of an output."""
    dtypes = [leaf.dtype for leaf in tree_leaves(output) if _is_compared(leaf)]
    return 10 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.5


def _is_compared(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _wide(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _relative(a: Tensor, b: Tensor) -> float | None:
    finite = a.isfinite()
    if not finite.any():
        return None
    largest, apart = a.abs()[finite].max(), float((a - b).abs()[finite].max())
    if apart == 0:
        return 0.0
    return apart / float(largest) if largest > 0 else float("inf")
