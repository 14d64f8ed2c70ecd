"""The fastest compositions of torch's own operators, for layers that torch does not have."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import SpecError
from normkit.kernels.reference import table_dtype
from normkit.layers.base import NormLayer, SegmentLayer

Map = Float[Tensor, "n c *s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Which elements share statistics: ``num_groups`` groups in each run of ``size`` examples."""

    num_runs: int
    size: int
    num_groups: int

    @classmethod
    def of(cls, layer: SegmentLayer, batch_size: int) -> Self:
        """The groups of a layer.

        Raises:
            SpecError: If the last run would be smaller, because then no view has the groups.
        """
        size = min(layer.partition.examples_per_group or batch_size, batch_size)
        if batch_size % size:
            raise SpecError(
                f"batch size {batch_size} is not divided by the {size} examples that share "
                f"statistics in {layer}; choose a multiple of {size}"
            )
        num_groups = layer.partition.num_groups
        return cls(num_runs=batch_size // size, size=size, num_groups=num_groups)

    def arrange(self, x: Map) -> Map:
        """Reorder the examples so that ``view(size, num_runs * C, ...)`` has runs as channels."""
        return self._swap(x, self.num_runs, self.size)

    def restore(self, x: Map) -> Map:
        """Undo ``arrange``."""
        return self._swap(x, self.size, self.num_runs)

    def _swap(self, x: Map, outer: int, inner: int) -> Map:
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        swapped = x.reshape(outer, inner, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
        return swapped.contiguous(memory_format=layout)


class _Affine(nn.Module):
    """Copies of a layer's weight and bias, and running statistics with one value per group."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: NormLayer, num_groups: int = 0) -> None:
        super().__init__()
        self.eps = layer.eps
        self.momentum = getattr(layer, "momentum", None) or 0.0
        self.weight = nn.Parameter(layer.get_parameter("weight").detach().clone())
        self.bias = nn.Parameter(layer.get_parameter("bias").detach().clone())
        self.register_buffer("running_mean", self.weight.new_zeros(num_groups))
        self.register_buffer("running_var", self.weight.new_ones(num_groups))
        count = torch.zeros((), dtype=torch.long, device=self.weight.device)
        self.register_buffer("num_batches_tracked", count)


class ByMoments(_Affine):
    """Moments by ``var_mean`` over a view, folded into one multiply-add."""

    def __init__(self, layer: SegmentLayer, groups: Groups) -> None:
        super().__init__(layer, groups.num_groups)
        self.groups = groups
        self.tracks = layer.track_running_stats

    def forward(self, x: Map) -> Map:
        """Normalise."""
        groups, num_channels = self.groups, x.shape[1]
        cells = x.reshape(groups.num_runs, groups.size, groups.num_groups, -1)
        cells = cells.to(table_dtype(x.dtype))
        var, mean = torch.var_mean(cells, dim=(1, 3), correction=0, keepdim=True)
        if self.tracks:
            self._update_(mean, var, groups.size * cells.shape[3])
        rstd = torch.rsqrt(var + self.eps)
        if num_channels % groups.num_groups:
            y = ((cells - mean) * rstd).reshape(x.shape[0], num_channels, -1)
            y = torch.addcmul(self.bias[:, None], y, self.weight[:, None])
        else:
            scale = self.weight.view(groups.num_groups, -1) * rstd
            shift = self.bias.view(groups.num_groups, -1) - mean * scale
            table = (groups.num_runs, 1, num_channels, 1)
            by_channel = cells.reshape(groups.num_runs, groups.size, num_channels, -1)
            y = torch.addcmul(shift.reshape(table), by_channel, scale.reshape(table))
        return y.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def _update_(self, mean: Tensor, var: Tensor, count: int) -> None:
        unbiased = var.mean(dim=0).flatten() * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.mean(dim=0).flatten(), self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        self.num_batches_tracked.add_(1)


class ByBatchNorm(_Affine):
    """``F.batch_norm`` over a view in which every group is a channel; nothing is copied.

    Runs of examples become channels: ``(N, C, ...)`` is viewed as ``(N/R, R*C, ...)``, so a run is
    every R-th example.
    """

    def __init__(self, layer: SegmentLayer, groups: Groups) -> None:
        super().__init__(layer, groups.num_groups)
        self.groups = groups

    def forward(self, x: Map) -> Map:
        """Normalise."""
        groups, num_channels = self.groups, x.shape[1]
        view = x.reshape(groups.size, groups.num_runs * groups.num_groups, -1)
        mean = self.running_mean.repeat(groups.num_runs)
        var = self.running_var.repeat(groups.num_runs)
        per_channel = groups.num_groups == num_channels
        weight, bias = (
            p.repeat(groups.num_runs) if per_channel else None for p in (self.weight, self.bias)
        )
        y = functional.batch_norm(view, mean, var, weight, bias, True, self.momentum, self.eps)
        self._update_(mean, var)
        if not per_channel:
            y = y.reshape(x.shape[0], num_channels, -1)
            y = torch.addcmul(self.bias[:, None], y, self.weight[:, None])
        return y.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def _update_(self, mean: Tensor, var: Tensor) -> None:
        shape = (self.groups.num_runs, self.groups.num_groups)
        torch.mean(mean.view(shape), dim=0, out=self.running_mean)
        torch.mean(var.view(shape), dim=0, out=self.running_var)
        self.num_batches_tracked.add_(1)


class ByLayerNorm(_Affine):
    """Positional norm as ``F.layer_norm`` with the channels moved to the end and back."""

    def forward(self, x: Map) -> Map:
        """Normalise."""
        last = x.movedim(1, -1)
        y = functional.layer_norm(last, last.shape[-1:], self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


class ByChannelMoments(_Affine):
    """Positional norm by ``var_mean`` over the channel axis."""

    def forward(self, x: Map) -> Map:
        """Normalise."""
        wide = x.to(table_dtype(x.dtype))
        var, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
        along = (-1, *(1,) * (x.ndim - 2))
        unit = (wide - mean) * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias.view(along), unit, self.weight.view(along)).to(x.dtype)
