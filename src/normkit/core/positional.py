r"""Statistics across the channels of one position, which no partition into segments can express.

The steps are those of ``normalize`` along the channel axis. With :math:`\hat g = \gamma g`,

.. math::  dx = r \, (\hat g - \overline{\hat g} - \hat x \, \overline{\hat g \hat x})

where the bars are means over channels and :math:`r = 1/\sqrt{\sigma^2 + \epsilon}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.core.compiled import recomputed_in_backward
from normkit.core.ending import Ending, differentiable_ended, ended
from normkit.core.mask import Valid, on_valid
from normkit.core.normalize import differentiable_gradient
from normkit.core.parameters import Parameters, empty_result
from normkit.core.routes import POSITIONAL
from normkit.core.transforms import needs_plain_formula
from normkit.errors import PartitionError
from normkit.kernels import ended_nodes, nodes
from normkit.kernels.calls import Gradients
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import decide
from normkit.typing import FeatureMap, PerChannel


def normalize_positions(
    x: FeatureMap,
    parameters: Parameters,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise every position over its channels, scale and shift every channel, and go on."""
    if valid is None and x.numel():
        way, _, _, kernels = decide(x, POSITIONAL)
        if way == "operator":
            return _by_kernel(kernels, x, parameters, ending)
    found = _normalized(x, parameters, valid)
    return found if ending is None else ended(found, ending, valid)


def _normalized(x: FeatureMap, parameters: Parameters, valid: Valid | None) -> FeatureMap:
    if x.numel() == 0:
        return empty_result(x, *parameters[:2])
    if valid is not None:
        return on_valid(x, valid, lambda x: normalize_positions(x, parameters))
    way, _, _, kernels = decide(x, POSITIONAL)
    if way == "operator":
        return _by_kernel(kernels, x, parameters, None)
    if way == "graph":
        return _compiled(x, *parameters)
    if needs_plain_formula():
        return _plain(x, *parameters)
    return _NormalizePositions.apply(x, *parameters)


def _by_kernel(
    kernels: nodes.Kernels, x: FeatureMap, parameters: Parameters, ending: Ending | None
) -> FeatureMap:
    """Normalise in one operator; second derivatives are those of the plain formula."""
    weight, bias, eps = parameters

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _plain(x, weight, bias, eps)

    def differentiable(
        grad: Tensor, x: Tensor, weight: Tensor | None, wanted: tuple[bool, bool, bool]
    ) -> Gradients:
        dx, dweight, dbias = differentiable_gradient(formula, (x, weight, bias), wanted, grad)
        return dx, dweight, dbias

    if ending is not None:
        call = ended_nodes.Ended(ending.activation, (), (eps,), of_positions=True)
        again_ended = differentiable_ended(formula, ending.activation, ending.residual is not None)
        given = (kernels, x, ending.residual, weight, bias, call, again_ended)
        return ended_nodes.normalize_ended(*given)[0]
    return nodes.normalize_positions(kernels, x, weight, bias, eps, differentiable)[0]


def require_channels(shape: Sequence[int], name: str) -> None:
    """Refuse positions of a single value, whose variance is zero and whose output is constant.

    Raises:
        PartitionError: If there is one channel.
    """
    if shape[1] == 1:
        raise PartitionError(
            f"{name} expected more than 1 value per position when training, got input of shape "
            f"{tuple(shape)} with a single channel; use more channels, another norm, or .eval()"
        )


def _plain(
    x: FeatureMap, weight: PerChannel | None, bias: PerChannel | None, eps: float
) -> FeatureMap:
    mean, rstd = _statistics(x, eps)
    return _affine((x - mean) * rstd, weight, bias).to(x.dtype)


def _compiled(
    x: FeatureMap, weight: PerChannel | None, bias: PerChannel | None, eps: float
) -> FeatureMap:
    """Compute the formula in operations that a compiler fuses into one pass each way."""

    def centre(wide: Tensor) -> tuple[Tensor, Tensor]:
        # Subtract the mean twice: its rounding error, which is large under a large offset, is the
        # mean of what is left after the first subtraction.
        near = wide - wide.mean(dim=1, keepdim=True).detach()
        mean, rstd = _statistics(near, eps)
        return near - mean, rstd

    centred, rstd = recomputed_in_backward(centre, x.to(table_dtype(x.dtype)))
    return _affine(centred * rstd, weight, bias).to(x.dtype)


def _statistics(x: FeatureMap, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of every position, ``(N, 1, *S)``."""
    var, mean = torch.var_mean(x.to(table_dtype(x.dtype)), dim=1, correction=0, keepdim=True)
    return mean, torch.rsqrt(var + eps)


def _affine(y: Tensor, weight: PerChannel | None, bias: PerChannel | None) -> Tensor:
    if weight is not None:
        y = y * _across(weight, y)
    return y if bias is None else y + _across(bias, y)


def _across(values: PerChannel, like: Tensor) -> Tensor:
    """Reshape one value per channel so that it broadcasts along the channel axis."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 2))


class _NormalizePositions(torch.autograd.Function):
    """Keeps ``x`` and one mean and one scale per position for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        mean, rstd = _statistics(x, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return _affine((x - mean) * rstd, weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted, grad = ctx.needs_input_grad[:3], grads[0]
        if torch.is_grad_enabled():
            found = differentiable_gradient(
                lambda x, weight, bias: _plain(x, weight, bias, ctx.eps),
                (x, weight, bias),
                wanted,
                grad,
            )
            return *found, None
        unit, grad = (x - mean) * rstd, grad.to(mean.dtype)
        others = [axis for axis in range(x.ndim) if axis != 1]
        dweight = (grad * unit).sum(others).to(weight.dtype) if wanted[1] else None
        dbias = grad.sum(others).to(bias.dtype) if wanted[2] else None
        return _input_gradient(grad, unit, rstd, weight).to(x.dtype), dweight, dbias, None


def _input_gradient(grad: Tensor, unit: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    grad = _affine(grad, weight, None)
    along = (grad * unit).mean(dim=1, keepdim=True)
    return rstd * (grad - grad.mean(dim=1, keepdim=True) - unit * along)
