"""Composites as a user would build them from torch's own operators."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.core.composite import Order
from normkit.kernels.reference import table_dtype
from normkit.layers.batch_channel import BatchChannelNorm
from normkit.layers.group_plus import GroupNormPlus
from normkit.layers.instance_batch import InstanceBatchNorm
from normkit.layers.switchable import SwitchableNorm

Map = Float[Tensor, "n c *s"]


class _Composed(nn.Module):
    """A module with copies of a layer's parameters and buffers, with ``_`` for ``.`` in names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in layer.named_parameters():
            copy = nn.Parameter(value.detach().clone())
            self.register_parameter(name.replace(".", "_"), copy)
        for name, value in layer.named_buffers():
            self.register_buffer(name.replace(".", "_"), value.detach().clone())

    def _batch_norm(
        self, x: Map, options: tuple[float, float], prefix: str = "", affine: bool = True
    ) -> Map:
        """Call ``F.batch_norm`` in training mode with the buffers of this prefix.

        ``options`` are momentum and eps.
        """
        self.get_buffer(f"{prefix}num_batches_tracked").add_(1)
        mean, var = (self.get_buffer(f"{prefix}running_{name}") for name in ("mean", "var"))
        names = ("weight", "bias")
        weight, bias = (self.get_parameter(prefix + n) if affine else None for n in names)
        momentum, eps = options
        return functional.batch_norm(x, mean, var, weight, bias, True, momentum, eps)


class BatchThenGroup(_Composed):
    """``F.batch_norm``, then ``F.group_norm``."""

    batch_weight: Tensor
    batch_bias: Tensor
    channel_weight: Tensor
    channel_bias: Tensor
    batch_running_mean: Tensor
    batch_running_var: Tensor
    batch_num_batches_tracked: Tensor

    def __init__(self, layer: BatchChannelNorm) -> None:
        super().__init__(layer)
        self.eps, self.momentum = layer.batch.eps, layer.momentum or 0.0
        self.num_groups = layer.num_groups
        self.repeats = layer.num_features // self.channel_weight.numel()

    def forward(self, x: Map) -> Map:
        """Normalise."""
        return self.group(self.batch(x))

    def batch(self, x: Map) -> Map:
        """The batch stage."""
        return self._batch_norm(x, (self.momentum, self.eps), "batch_")

    def group(self, x: Map) -> Map:
        """The channel stage."""
        weight, bias = self.channel_weight, self.channel_bias
        if self.repeats != 1:
            weight, bias = (p.repeat_interleave(self.repeats) for p in (weight, bias))
        return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


class EstimateThenGroup(BatchThenGroup):
    """Algorithm 1 in torch's operators: estimates move, then ``F.batch_norm`` by them."""

    def __init__(self, layer: BatchChannelNorm) -> None:
        super().__init__(layer)
        self.rate = layer.update_rate

    def batch(self, x: Map) -> Map:
        """The batch stage."""
        mean, var = self.batch_running_mean, self.batch_running_var
        self._update_(x.detach())
        # Clones, because the next step's update must not change what backward uses.
        affine = (self.batch_weight, self.batch_bias)
        return functional.batch_norm(x, mean.clone(), var.clone(), *affine, False, 0.0, self.eps)

    @torch.no_grad()
    def _update_(self, x: Map) -> None:
        mean, var = self.batch_running_mean, self.batch_running_var
        axes = [0, *range(2, x.ndim)]
        batch_var, batch_mean = torch.var_mean(x.to(mean.dtype), dim=axes, correction=0)
        distance = batch_var + (batch_mean - mean).square()
        mean.lerp_(batch_mean, self.rate)
        var.lerp_(distance, self.rate)
        self.batch_num_batches_tracked.add_(1)


class GroupAndBatch(_Composed):
    """``F.group_norm`` and ``F.batch_norm``, mixed."""

    weight: Tensor
    bias: Tensor
    mix_logit: Tensor

    def __init__(self, layer: GroupNormPlus) -> None:
        super().__init__(layer)
        self.eps, self.momentum = layer.eps, layer.momentum or 0.0
        self.num_groups = layer.num_groups
        self.order: Order = layer.order

    def forward(self, x: Map) -> Map:
        """Normalise."""
        group, batch = self._norms(x, self.order)
        share = torch.sigmoid(self.mix_logit)
        along = (-1, *(1,) * (x.ndim - 2))
        mixed = share * group + (1 - share) * batch
        weight, bias = self.weight.view(along), self.bias.view(along)
        return (mixed * weight + bias).to(x.dtype)

    def _norms(self, x: Map, order: Order) -> tuple[Map, Map]:
        if order == "group-first":
            group = self._group(x)
            return group, self._batch(group)
        batch = self._batch(x)
        return self._group(batch if order == "batch-first" else x), batch

    def _group(self, x: Map) -> Map:
        return functional.group_norm(x, self.num_groups, eps=self.eps)

    def _batch(self, x: Map) -> Map:
        return self._batch_norm(x, (self.momentum, self.eps), affine=False)


class Switched(_Composed):
    """Statistics by ``var_mean`` of the map once, the others' from those of the instances."""

    weight: Tensor
    bias: Tensor
    mean_logits: Tensor
    var_logits: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: SwitchableNorm) -> None:
        super().__init__(layer)
        self.eps, self.momentum, self.use_batch = layer.eps, layer.momentum or 0.0, layer.use_batch

    def forward(self, x: Map) -> Map:
        """Normalise."""
        wide = x.to(table_dtype(x.dtype)).flatten(2)
        var, mean = torch.var_mean(wide, dim=2, correction=0, keepdim=True)
        tables = [(mean, var), _pool(mean, var, 1)]
        if self.use_batch:
            tables.append(_pool(mean, var, 0))
            self._update_(*tables[2], x.numel() // x.shape[1])
        means, variances = zip(*tables, strict=True)
        mixed_mean = _mix(self.mean_logits, means)
        rstd = torch.rsqrt(_mix(self.var_logits, variances) + self.eps)
        y = (wide - mixed_mean) * rstd * self.weight[:, None] + self.bias[:, None]
        return y.view(x.shape).to(x.dtype)

    @torch.no_grad()
    def _update_(self, mean: Tensor, var: Tensor, count: int) -> None:
        self.running_mean.lerp_(mean.flatten(), self.momentum)
        self.running_var.lerp_(var.flatten() * (count / max(count - 1, 1)), self.momentum)
        self.num_batches_tracked.add_(1)


def _pool(mean: Tensor, var: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    pooled = mean.mean(dim=axis, keepdim=True)
    return pooled, (var + (mean - pooled).square()).mean(dim=axis, keepdim=True)


def _mix(logits: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    shares = torch.softmax(logits, dim=0)
    return sum(
        (share * table for share, table in zip(shares[1:], tables[1:], strict=True)),
        start=shares[0] * tables[0],
    )


class Halves(_Composed):
    """``F.instance_norm`` and ``F.batch_norm`` of the two parts, concatenated."""

    instance_weight: Tensor
    instance_bias: Tensor

    def __init__(self, layer: InstanceBatchNorm) -> None:
        super().__init__(layer)
        self.num_instance, self.eps = layer.instance.num_features, layer.instance.eps
        self.momentum = layer.momentum or 0.0

    def forward(self, x: Map) -> Map:
        """Normalise."""
        sizes = [self.num_instance, x.shape[1] - self.num_instance]
        instance, batch = torch.split(x, sizes, dim=1)
        left = functional.instance_norm(
            instance, weight=self.instance_weight, bias=self.instance_bias, eps=self.eps
        )
        right = self._batch_norm(batch, (self.momentum, self.eps), "batch_")
        return torch.cat([left, right], dim=1)


def composition_of(layer: nn.Module) -> nn.Module | None:
    """The composition that computes the same as a composite layer; None for other layers."""
    if isinstance(layer, BatchChannelNorm):
        return EstimateThenGroup(layer) if layer.micro_batch else BatchThenGroup(layer)
    for kind, composed in _COMPOSED.items():
        if isinstance(layer, kind):
            return composed(layer)
    return None


def is_composite(layer: nn.Module) -> bool:
    """Whether a layer combines several norms."""
    return isinstance(layer, (BatchChannelNorm, *_COMPOSED))


_COMPOSED = {GroupNormPlus: GroupAndBatch, SwitchableNorm: Switched, InstanceBatchNorm: Halves}
