r"""Normalisation in three steps: moments, the layer's algebra on tables, apply; and its gradient.

.. math::  y = scale \cdot (x - mean) + center

with one ``(scale, center)`` per segment. ``y`` is written around the segment's own mean, so that a
large offset does not cancel. Backward has the same steps: one pass for ``sum(g)`` and
``sum(g * (x - mean))``, the transpose of the algebra on tables, one pass for
``dx = k1*g + k2*(x - mean) + k3``. Only ``x`` and tables are kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.core.compiled import normalize_compiled
from normkit.core.mask import Valid, masked_moments, on_valid, without_invalid
from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.core.transforms import needs_plain_formula
from normkit.kernels import reference
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import Way, primitives
from normkit.typing import FeatureMap, SegmentTable


class Affine(NamedTuple):
    """The affine map of each segment: ``scale * (x - mean) + center``."""

    scale: SegmentTable
    center: SegmentTable


Algebra = Callable[..., Affine]
"""Maps ``Moments`` of the segments and parameters to scale and center, by differentiable operations
on tables."""


Known = tuple[FeatureMap | None, Moments]
"""A result that was computed before, or None, and the moments of the input."""


def measure(x: FeatureMap, segment_size: int, valid: Valid | None = None) -> Moments:
    """Compute the moments ``(N, K)`` of the segments' valid values, without a gradient."""
    if x.shape[0] == 0:
        table = x.new_zeros(0, math.prod(x.shape[1:]) // segment_size, dtype=table_dtype(x.dtype))
        return Moments(table, table)
    with torch.no_grad():
        if valid is not None:
            return masked_moments(without_invalid(x, valid), valid, segment_size)
        return Moments(*primitives(x).moments(x, segment_size))


def normalize(
    x: FeatureMap,
    segment_size: int,
    algebra: Algebra,
    *parameters: Tensor | None,
    known: Known | None = None,
    valid: Valid | None = None,
    way: Way = "tables",
) -> tuple[FeatureMap, Moments]:
    """Normalise ``x`` by the scale and center that ``algebra`` computes from its moments.

    Args:
        x: Feature map, ``(N, C, *S)``, not empty.
        segment_size: Elements ``L`` of a segment; divides the positions of a channel.
        algebra: ``algebra(moments, *parameters)``; a gradient flows through it.
        parameters: Tensors that the algebra uses and that may require a gradient.
        known: Moments, and if known the result, of an earlier call on the same input. They are not
            computed again, but the result gets a gradient.
        valid: Mask of the positions that count in the statistics; the result is 0 at the others.
        way: The decided way; only ``"graph"`` makes a difference here: then the call is computed
            in operations that a compiler can fuse.

    Returns:
        The result in the dtype and layout of ``x``, and the detached moments ``(N, K)``.
    """
    if way == "graph":
        y, table = _compiled(x, segment_size, algebra, parameters)
    elif needs_plain_formula() or valid is not None:
        y, table = plain(x, segment_size, algebra, parameters, valid)
    else:
        y, mean, var = _Normalize.apply(x, segment_size, (algebra, known), *parameters)
        table = Moments(mean, var)
    return y, table.detach()


def plain(
    x: FeatureMap,
    segment_size: int,
    algebra: Algebra,
    parameters: tuple[Tensor | None, ...],
    valid: Valid | None = None,
) -> tuple[FeatureMap, Moments]:
    """Do what ``normalize`` does in plain operators: any derivative, vmap, export, masks."""
    # Cast once, so that autograd adds up the parts of the gradient in the wide dtype.
    wide = x.to(table_dtype(x.dtype))
    if valid is None:
        table = Moments(*reference.moments(wide, segment_size))
    else:
        table = masked_moments(without_invalid(wide, valid), valid, segment_size)
    scale, center = algebra(table, *parameters)

    def apply(wide: FeatureMap) -> FeatureMap:
        return reference.apply(wide, table.mean, scale, center, segment_size).to(x.dtype)

    return on_valid(wide, valid, apply), table


def _compiled(
    x: FeatureMap, segment_size: int, algebra: Algebra, parameters: tuple[Tensor | None, ...]
) -> tuple[FeatureMap, Moments]:
    """Do what ``normalize`` does, in operations that a compiler can fuse."""

    def tables(table: Moments) -> tuple[Tensor, Tensor, Tensor]:
        scale, center = algebra(table, *parameters)
        return table.mean, scale, center

    num_segments = x.shape[1] * (math.prod(x.shape[2:]) // segment_size)
    segments = Partition(num_groups=num_segments, examples_per_group=1)
    return normalize_compiled(x, segments, tables)


class _Normalize(torch.autograd.Function):
    """Keeps ``x`` and tables; its second derivative goes through the plain formula."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        segment_size: int,
        algebra_and_known: tuple[Algebra, Known | None],
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        algebra, known = algebra_and_known
        y, table = _forward(x, segment_size, algebra, parameters, known)
        mean, var = table.mean, table.var
        ctx.save_for_backward(x, mean, var, *parameters)
        ctx.segment_size, ctx.algebra = segment_size, algebra
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return as_non_view(y.view_as(y) if known is not None and y is known[0] else y), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if not torch.is_grad_enabled():
            dx, *rest = _gradient(ctx, grad)
            return dx, None, None, *rest
        x, _, _, *parameters = ctx.saved_tensors
        dx, *rest = differentiable_gradient(
            lambda x, *p: plain(x, ctx.segment_size, ctx.algebra, p)[0],
            (x, *parameters),
            (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]),
            grad,
        )
        return dx, None, None, *rest


def _forward(
    x: Tensor,
    segment_size: int,
    algebra: Algebra,
    parameters: tuple[Tensor | None, ...],
    known: Known | None,
) -> tuple[Tensor, Moments]:
    y, table = known or (None, measure(x, segment_size))
    if y is not None:
        return y, table
    scale, center = algebra(table, *parameters)
    return primitives(x).apply(x, table.mean, scale, center, segment_size), table


def _gradient(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradient of ``x`` and of each parameter in two passes over the map."""
    x, mean, var, *parameters = ctx.saved_tensors
    size = ctx.segment_size
    kernels = primitives(x)
    sum_grad, sum_grad_x = kernels.reduce_grad(grad, x, mean, size)
    wanted = ctx.needs_input_grad[3:]
    (scale, dmean, dvar), gradients = _transpose(
        ctx.algebra, Moments(mean, var), parameters, wanted, (sum_grad_x, sum_grad)
    )
    if not ctx.needs_input_grad[0]:
        return [None, *gradients]
    factors = (scale, dvar * (2 / size), (dmean - scale * sum_grad) / size)
    return [kernels.combine_grad(grad, x, mean, factors, size), *gradients]


def _transpose(
    algebra: Algebra,
    table: Moments,
    parameters: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: tuple[SegmentTable, SegmentTable],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor | None]]:
    """Pull the gradients of ``(scale, center)`` back to the moments and the parameters.

    Returns:
        ``scale`` with the gradients of mean and variance, and one gradient for each parameter.
    """
    mean, var = (t.detach().requires_grad_() for t in (table.mean, table.var))
    inputs = [
        p.detach().requires_grad_() if p is not None and want else p
        for p, want in zip(parameters, wanted, strict=True)
    ]
    sources = [mean, var, *(p for p, want in zip(inputs, wanted, strict=True) if want)]
    with torch.enable_grad():
        scale, center = algebra(Moments(mean, var), *inputs)
    sums = [
        grad.to(t.dtype).sum_to_size(t.shape)
        for grad, t in zip(grads, (scale, center), strict=True)
    ]
    dmean, dvar, *found = torch.autograd.grad(
        (scale, center), sources, sums, allow_unused=True, materialize_grads=True
    )
    remaining = iter(found)
    return (scale.detach(), dmean, dvar), [next(remaining) if want else None for want in wanted]


def apply_tables(
    x: FeatureMap,
    mean: SegmentTable,
    scale: SegmentTable,
    center: SegmentTable,
    segment_size: int,
) -> FeatureMap:
    """Compute ``scale * (x - mean) + center`` with given tables; ``mean`` gets no gradient."""
    if needs_plain_formula():
        return reference.apply(x, mean, scale, center, segment_size)
    return _Apply.apply(x, mean, scale, center, segment_size)


class _Apply(torch.autograd.Function):
    """Keeps ``x`` and tables; its second derivative goes through the plain formula."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        center: Tensor,
        segment_size: int,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale, center)
        ctx.segment_size = segment_size
        return as_non_view(primitives(x).apply(x, mean, scale, center, segment_size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, center = ctx.saved_tensors
        wants_x, _, wants_scale, wants_center, _ = ctx.needs_input_grad
        grad, size = grads[0], ctx.segment_size
        if torch.is_grad_enabled():
            dx, dscale, dcenter = differentiable_gradient(
                lambda x, scale, center: reference.apply(x, mean, scale, center, size),
                (x, scale, center),
                (wants_x, wants_scale, wants_center),
                grad,
            )
            return dx, None, dscale, dcenter, None
        dx = dscale = dcenter = None
        if wants_x:
            dx = reference.apply(grad, torch.zeros_like(mean), scale, torch.zeros_like(mean), size)
        if wants_scale or wants_center:
            sum_grad, sum_grad_x = reference.reduce_grad(grad, x, mean, size)
            dscale, dcenter = (
                sum_grad_x.sum_to_size(scale.shape),
                sum_grad.sum_to_size(center.shape),
            )
        return dx, None, dscale, dcenter, None


def as_non_view(y: Tensor) -> Tensor:
    """Return a non-view: autograd rejects in-place operations on views made in a Function."""
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


def differentiable_gradient(
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Differentiable gradients of ``plain(*inputs)``; None for inputs that want none."""
    sources = [t for t, want in zip(inputs, wanted, strict=True) if t is not None and want]
    found = iter(torch.autograd.grad(plain(*inputs), sources, grad, create_graph=True))
    return [next(found) if want else None for want in wanted]
