"""``torch.ops.normkit.*``: the schema of each operator, and the shapes of its results.

C++ computes the operators on the CPU (``csrc/library.cpp``), Triton on a GPU
(``triton/operators.py``). ``torch.compile``, ``torch.export`` and meta tensors use this file.

``x`` and ``grad`` are feature maps ``(N, C, *S)``; ``weight`` and ``bias`` have one value per
channel. Statistics groups are ``num_groups`` equal runs of the flat ``(C, *S)`` axis times runs
of ``examples_per_group`` consecutive examples (0: all). Composites are programs on tables, see
``kernels.program``. Results share the strides of ``x``. Tables are float64, with a row of means
and a row of biased variances. Operators update running statistics, which saves calls on tiny maps.

The operators ``ended_*`` also compute ``act(y + residual)``. Their backward takes ``residual``, or
``result`` if the sign of the result determines the activation's derivative. Those of a composite
also take ``factors``, scale and center of every channel of every example, to compute ``y`` again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.program import parsed

NAMESPACE = "normkit"

_POOLING = "int num_groups, int examples_per_group, float eps"
_NEEDS = "bool need_weight, bool need_bias"
_THREE = "(Tensor dx, Tensor dweight, Tensor dbias)"
_FOUR = "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
_ENDING = "int activation, float slope"
_MOVED = (
    "Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
    "Tensor(c!)? num_batches_tracked=None"
)
_COMPOSITE = (
    "str program, Tensor? first, Tensor? second, Tensor? third, Tensor? fourth, float share"
)
SCHEMAS = {
    "pooled_forward": f"(Tensor x, Tensor? weight, Tensor? bias, {_POOLING}, "
    f"bool channel_statistics, {_MOVED}, float momentum=0.0) -> (Tensor y, Tensor table)",
    "pooled_backward": f"(Tensor grad, Tensor x, Tensor table, Tensor? weight, {_POOLING}, "
    f"{_NEEDS}) -> {_THREE}",
    "evaluate_forward": "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "int num_groups, float eps) -> Tensor y",
    "evaluate_backward": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
    f"int num_groups, float eps, {_NEEDS}) -> {_THREE}",
    "ended_forward": f"(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_POOLING}, "
    f"bool channel_statistics, {_ENDING}, {_MOVED}, float momentum=0.0) "
    "-> (Tensor y, Tensor table)",
    "ended_backward": "(Tensor grad, Tensor x, Tensor table, Tensor? residual, Tensor? result, "
    f"Tensor? weight, Tensor? bias, {_POOLING}, {_ENDING}, bool need_residual, {_NEEDS}) "
    f"-> {_FOUR}",
    "ended_evaluate_forward": "(Tensor x, Tensor? residual, Tensor mean, Tensor var, "
    f"Tensor? weight, Tensor? bias, int num_groups, float eps, {_ENDING}) -> Tensor y",
    "ended_evaluate_backward": "(Tensor grad, Tensor x, Tensor mean, Tensor var, "
    "Tensor? residual, Tensor? result, Tensor? weight, Tensor? bias, int num_groups, float eps, "
    f"{_ENDING}, bool need_residual, {_NEEDS}) -> {_FOUR}",
    "positional_forward": "(Tensor x, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor y, Tensor table)",
    "positional_backward": "(Tensor grad, Tensor x, Tensor table, Tensor? weight, float eps, "
    f"{_NEEDS}) -> {_THREE}",
    "composite_forward": f"(Tensor x, {_COMPOSITE}, Tensor? given_mean=None, "
    f"Tensor? given_var=None, {_MOVED}) -> (Tensor y, Tensor table)",
    "composite_backward": f"(Tensor grad, Tensor x, Tensor table, {_COMPOSITE}, int wanted) "
    "-> (Tensor dx, Tensor dfirst, Tensor dsecond, Tensor dthird, Tensor dfourth)",
    "ended_positional_forward": "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    f"float eps, {_ENDING}) -> (Tensor y, Tensor table)",
    "ended_positional_backward": "(Tensor grad, Tensor x, Tensor table, Tensor? residual, "
    f"Tensor? result, Tensor? weight, Tensor? bias, float eps, {_ENDING}, bool need_residual, "
    f"{_NEEDS}) -> {_FOUR}",
    "ended_composite_forward": f"(Tensor x, Tensor? residual, {_COMPOSITE}, {_ENDING}, "
    f"Tensor? given_mean=None, Tensor? given_var=None, {_MOVED}) "
    "-> (Tensor y, Tensor table, Tensor factors)",
    "ended_composite_backward": "(Tensor grad, Tensor x, Tensor table, Tensor factors, "
    f"Tensor? residual, Tensor? result, {_COMPOSITE}, {_ENDING}, bool need_residual, int wanted) "
    "-> (Tensor dx, Tensor dresidual, Tensor dfirst, Tensor dsecond, Tensor dthird, "
    "Tensor dfourth)",
    "moments": "(Tensor x, SymInt segment_size, bool wide=False) -> (Tensor mean, Tensor var)",
    "apply": "(Tensor x, Tensor mean, Tensor scale, Tensor center) -> Tensor y",
    "reduce_grad": "(Tensor grad, Tensor x, Tensor mean) "
    "-> (Tensor grad_sum, Tensor grad_product_sum)",
    "combine_grad": "(Tensor grad, Tensor x, Tensor mean, Tensor k1, Tensor k2, Tensor k3) "
    "-> Tensor dx",
}


@cache
def define() -> None:
    """Define the operators in torch, once, before kernels are registered for them.

    The tag says that they read maps of any strides. Without it inductor would copy a map to the
    strides that it had in eager mode.
    """
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema, tags=torch.Tag.flexible_layout)
        torch.library.register_fake(f"{NAMESPACE}::{name}", _on_one_device(_FAKES[name]))


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse tensors on several devices; torch calls the fake if one of them is on meta."""

    def checked(*arguments: Any) -> Any:
        devices = {a.device for a in arguments if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise several_devices(arguments)
        return fake(*arguments)

    return checked


def several_devices(arguments: Iterable[object]) -> RuntimeError:
    """The error for a call whose tensors are on several devices."""
    devices = {a.device for a in arguments if isinstance(a, Tensor)}
    return RuntimeError(
        f"all tensors of a call are on one device; these are on "
        f"{', '.join(sorted(map(str, devices)))}; move the layer or the input with "
        f".to(device) (a layer on meta needs .to_empty and reset_parameters)"
    )


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous or channels_last (of any rank), which kernels read in place."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _result(x: Tensor) -> Tensor:
    if is_dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _table(x: Tensor, *shape: int | torch.SymInt, wide: bool = True) -> Tensor:
    dtype = torch.float64 if wide or x.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=x.device)


def _pooled_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    num_groups, examples_per_group, _, channel_statistics = arguments[2:6]
    num_examples, num_channels = x.shape[:2]
    num_batches = 1
    if examples_per_group > 0:
        num_batches = (num_examples + examples_per_group - 1) // examples_per_group
    num_cells = num_batches * num_groups + (num_channels if channel_statistics else 0)
    return _result(x), _table(x, 2, num_cells)


def _three(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    need_weight, need_bias = arguments[-2:]
    num_channels = x.shape[1]
    dweight = _table(x, num_channels if need_weight else 0, wide=False)
    dbias = _table(x, num_channels if need_bias else 0, wide=False)
    return _result(x), dweight, dbias


def _ended_forward(
    x: Tensor,
    residual: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    return _pooled_forward(x, *arguments)


def _four(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias = _three(grad, x, *arguments)
    need_residual = arguments[-3]
    return dx, _result(x) if need_residual else _table(x, 0, wide=False), dweight, dbias


def _ended_positional_forward(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _positional_forward(x)


def _ended_composite_forward(
    x: Tensor,
    residual: Tensor | None,
    program: str,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    return *_composite_forward(x, program), _table(x, 2, x.shape[0] * x.shape[1])


def _ended_composite_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    factors: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    need_residual = arguments[-2]
    dx, *found = _composite_backward(grad, x, table, *arguments)
    return dx, _result(x) if need_residual else _table(x, 0, wide=False), *found


def _composite_forward(x: Tensor, program: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    num_examples, num_channels = x.shape[:2]
    return _result(x), _table(x, 2, num_examples * num_channels + parsed(program).kept_columns)


def _composite_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    program: str,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    wanted = arguments[-1]
    sizes = [
        p.numel() if p is not None and wanted >> i & 1 else 0 for i, p in enumerate(arguments[:4])
    ]
    return _result(x), *(_table(x, size, wide=False) for size in sizes)


def _like_x(x: Tensor, *arguments: object) -> Tensor:
    return _result(x)


def _like_gradient(grad: Tensor, x: Tensor, *arguments: object) -> Tensor:
    return _result(x)


def _positional_forward(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _result(x), _table(x, 2, x.shape[0] * _product(x.shape[2:]))


def _product(sizes: torch.Size) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _moments(x: Tensor, segment_size: int, wide: bool = False) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] * (_product(x.shape[2:]) // segment_size))
    return _table(x, *shape, wide=wide), _table(x, *shape, wide=wide)


def _reduce_grad(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], mean.shape[1])
    return _table(x, *shape, wide=False), _table(x, *shape, wide=False)


_FAKES: dict[str, Callable[..., Any]] = {
    "pooled_forward": _pooled_forward,
    "pooled_backward": _three,
    "evaluate_forward": _like_x,
    "evaluate_backward": _three,
    "ended_forward": _ended_forward,
    "ended_backward": _four,
    "ended_evaluate_forward": _like_x,
    "ended_evaluate_backward": _four,
    "positional_forward": _positional_forward,
    "positional_backward": _three,
    "composite_forward": _composite_forward,
    "composite_backward": _composite_backward,
    "ended_positional_forward": _ended_positional_forward,
    "ended_positional_backward": _four,
    "ended_composite_forward": _ended_composite_forward,
    "ended_composite_backward": _ended_composite_backward,
    "moments": _moments,
    "apply": _like_x,
    "reduce_grad": _reduce_grad,
    "combine_grad": _like_gradient,
}
