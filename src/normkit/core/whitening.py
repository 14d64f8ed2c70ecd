"""Group whitening, the one method that mixes channels, so that moments are not enough for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from normkit.core.mask import Valid, on_valid
from normkit.core.parameters import Parameters
from normkit.kernels.reference import table_dtype
from normkit.typing import FeatureMap


def whiten_groups(
    x: FeatureMap,
    num_groups: int,
    num_iterations: int,
    parameters: Parameters,
    valid: Valid | None = None,
) -> FeatureMap:
    """Decorrelate the groups of every example, then scale and shift every channel."""
    if valid is None:
        return _whiten(x, num_groups, num_iterations, parameters, None)
    return on_valid(x, valid, lambda x: _whiten(x, num_groups, num_iterations, parameters, valid))


def _whiten(
    x: FeatureMap,
    num_groups: int,
    num_iterations: int,
    parameters: Parameters,
    valid: Valid | None,
) -> FeatureMap:
    weight, bias, eps = parameters
    wide = table_dtype(x.dtype)
    rows = x.to(wide).reshape(x.shape[0], num_groups, -1)
    if valid is None:
        rows, count = rows - rows.mean(dim=-1, keepdim=True), rows.shape[2]
    else:
        inside = valid.expand_as(x).reshape(rows.shape)
        count = inside.sum(dim=-1, keepdim=True).clamp(min=1)[:, :1]  # the same in all rows
        rows = (rows - rows.sum(dim=-1, keepdim=True) / count).masked_fill(~inside, 0)
    with _wide_products(x):
        y = (_whitening_matrix(rows, count, num_iterations, eps) @ rows).reshape(x.shape)
    across = (1, -1, *(1,) * (x.ndim - 2))
    if weight is not None:
        y = y * weight.to(wide).reshape(across)
    if bias is not None:
        y = y + bias.to(wide).reshape(across)
    y = y.to(x.dtype)
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)  # keeps the memory format of x


def _wide_products(x: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from computing matrix products in 16 bits."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# torch.compile of torch 2.11 cannot trace this function, so its result is made a constant.
_has_autocast._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _whitening_matrix(rows: Tensor, count: int | Tensor, num_iterations: int, eps: float) -> Tensor:
    """Newton's approximation of ``Sigma^(-1/2)``, ``(N, G, G)``, of centred rows ``(N, G, m)``.

    ``count`` of the ``m`` values are valid; the others are 0.

    The steps ``P <- 1.5 P - 0.5 P^3 Sigma`` are computed with the product ``P Sigma`` updated
    beside ``P``. The result is the same, but rounding errors that do not commute with ``Sigma`` no
    longer grow from step to step.
    """
    identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    covariance = rows @ rows.transpose(-1, -2) / count + eps * identity
    trace = (covariance * identity).sum(dim=(-2, -1), keepdim=True)
    carried = covariance / trace
    root = identity.expand_as(carried)
    for _ in range(num_iterations):
        step = 1.5 * identity - 0.5 * (root @ carried)
        carried, root = carried @ step, step @ root
    return root / trace.sqrt()
