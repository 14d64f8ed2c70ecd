"""Running a model on an example input, and comparing outputs before and after folding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from normkit.folding.affine import to_float64
from normkit.passes import call_with, copied, untouched


class ForwardResult(NamedTuple):
    """A model's output, and how often some of its layers were called."""

    output: Any
    calls: Counter[nn.Module]


def run(
    model: nn.Module,
    example_input: Any,
    layers: Collection[nn.Module] = (),
) -> ForwardResult:
    """Send the example input through a model in its current mode.

    The random states are restored, so that a second call draws the same random numbers.

    Args:
        model: The model; it is not changed.
        example_input: A tuple of arguments, a dict of keyword arguments, or a single argument.
        layers: The layers whose calls are counted.
    """
    calls: Counter[nn.Module] = Counter()

    def count(layer: nn.Module, _args: Any, _output: Any) -> None:
        calls[layer] += 1

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.no_grad())
        for layer in layers:
            stack.callback(layer.register_forward_hook(count).remove)
        return ForwardResult(call_with(model, copied(example_input)), calls)


def difference(before: Any, after: Any) -> float | None:
    r"""Compare two outputs of any structure: the largest error over the largest value.

    .. math::  \max_t \max_i |a_{ti} - b_{ti}| / \max_i |a_{ti}|

    over the floating-point tensors ``t``, where ``a`` is finite. The result is None if there are no
    such tensors, all of their values are NaN or infinite, or the shapes or structures differ.
    """
    (first, structure), (second, other_structure) = tree_flatten(before), tree_flatten(after)
    if structure != other_structure:
        return None
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if _is_compared(a)]
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    found = [_relative_error(to_float64(a), to_float64(b)) for a, b in pairs]
    return max((each for each in found if each is not None), default=None)


def tolerance(output: Any) -> float:
    """Return the largest difference that rounding can explain, in an output's coarsest dtype."""
    dtypes = [leaf.dtype for leaf in tree_leaves(output) if _is_compared(leaf)]
    return 10 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.5


def _is_compared(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _relative_error(a: Tensor, b: Tensor) -> float | None:
    finite = a.isfinite()
    if not finite.any():
        return None
    largest, error = a.abs()[finite].max(), float((a - b).abs()[finite].max())
    if error == 0:
        return 0.0
    return error / float(largest) if largest > 0 else float("inf")
