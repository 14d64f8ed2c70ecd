"""The kernels as torch operators ``torch.ops.normkit_triton.*``, which ``torch.compile`` keeps.

Shapes and dtypes of their results are those of the C++ operators of the same names; composites
return the statistics of groups beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.cpu import shapes
from normkit.kernels.cpu.composite import Batch, Buffers, Composite, Options, Slots
from normkit.kernels.cpu.functions import Pooling
from normkit.kernels.cpu.kinds import BatchSource, Kind
from normkit.kernels.triton import composite as composites
from normkit.kernels.triton import pooled, positional
from normkit.kernels.triton.launch import INTERPRETED
from normkit.kernels.triton.passes import Statistics
from normkit.kernels.triton.pooled import Results, Wanted

NAMESPACE = "normkit_triton"


def pooled_forward(  # noqa: PLR0913, PLR0917 - the operator's own arguments, in its order
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    channel_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise by the statistics of ``x``'s own groups: ``y`` and the statistics."""
    pooling = Pooling(num_groups, examples_per_group, eps, channel_statistics)
    return pooled.forward(x, (weight, bias), pooling, None)


def pooled_backward(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Results:
    """Gradients of x, weight and bias."""
    pooling = Pooling(num_groups, examples_per_group, eps)
    return pooled.backward(grad, x, table, weight, pooling, Wanted(need_weight, need_bias))


def evaluate_forward(  # noqa: PLR0913, PLR0917
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
) -> Tensor:
    """Normalise by given statistics ``(num_groups,)``."""
    return pooled.forward_given(x, Statistics(mean, var, eps), (weight, bias))


def evaluate_backward(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    num_groups: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Results:
    """Gradients of x, weight and bias; the statistics are constants."""
    wanted = Wanted(need_weight, need_bias)
    return pooled.backward_given(grad, x, Statistics(mean, var, eps), weight, wanted)


def positional_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise each position over its channels: ``y`` and the statistics."""
    return positional.forward(x, weight, bias, eps)


def positional_backward(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Results:
    """Gradients of x, weight and bias; the table is not needed, for ``x`` is read anyway."""
    return positional.backward(grad, x, weight, eps, (need_weight, need_bias))


def composite_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """Normalise by a composite: ``y``, the statistics, and those of groups that come first."""
    *composite, given_mean, given_var = arguments
    return composites.forward(x, *_composite(*composite), Buffers(given_mean, given_var))


def composite_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    groups: Tensor,
    *arguments: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters that are wanted."""
    *composite, wanted = arguments
    return composites.backward(grad, x, (table, groups), *_composite(*composite), wanted)


def _composite(kind: int, *arguments: Any) -> tuple[Slots, Options]:  # noqa: ANN401
    """Read what ``flat`` has written."""
    first, second, third, fourth, num_groups, batch_eps, group_eps, source, rate = arguments
    composite = Composite(Kind(kind), num_groups, batch_eps, group_eps)
    return (first, second, third, fourth), (composite, Batch(BatchSource(source), rate))


_POOLING = "int num_groups, int examples_per_group, float eps"
_NEEDS = "bool need_weight, bool need_bias"
_SLOTS = "Tensor? first, Tensor? second, Tensor? third, Tensor? fourth"
_COMPOSITE = (
    f"int kind, {_SLOTS}, int num_groups, float batch_eps, float group_eps, int batch_source, "
    "float rate"
)
SCHEMAS: dict[Callable[..., object], str] = {
    pooled_forward: f"(Tensor x, Tensor? weight, Tensor? bias, {_POOLING}, "
    "bool channel_statistics) -> (Tensor, Tensor)",
    pooled_backward: f"(Tensor grad, Tensor x, Tensor table, Tensor? weight, {_POOLING}, {_NEEDS})"
    " -> (Tensor, Tensor, Tensor)",
    evaluate_forward: "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "int num_groups, float eps) -> Tensor",
    evaluate_backward: "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
    f"int num_groups, float eps, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    positional_forward: "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    positional_backward: "(Tensor grad, Tensor x, Tensor table, Tensor? weight, float eps, "
    f"{_NEEDS}) -> (Tensor, Tensor, Tensor)",
    composite_forward: f"(Tensor x, {_COMPOSITE}, Tensor? given_mean, Tensor? given_var) "
    "-> (Tensor, Tensor, Tensor)",
    composite_backward: f"(Tensor grad, Tensor x, Tensor table, Tensor groups, {_COMPOSITE}, "
    "int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _composite_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    _, (composite, _) = _composite(*arguments[:-2])
    groups = x.new_empty((2, composites.num_kept_groups(x, composite)), dtype=torch.float64)
    return *shapes.composite_forward(x, *arguments), groups


def _composite_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    groups: Tensor,
    *arguments: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    return shapes.composite_backward(grad, x, table, *arguments)


_SHAPES = {composite_forward: _composite_forward, composite_backward: _composite_backward}
"""Of the results, where C++'s operators have others."""


@cache
def register() -> None:
    """Tell torch of the operators; once."""
    for function, schema in SCHEMAS.items():
        name = f"{NAMESPACE}::{function.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "cpu" if INTERPRETED else "cuda", function)
        shapes.register_one(name, _SHAPES.get(function))
