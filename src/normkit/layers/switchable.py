"""SwitchableNorm: the statistics of instance, layer and batch norm, mixed by learned shares."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from normkit.core.mask import Valid
from normkit.core.partition import Partition
from normkit.core.ranks import ProcessGroup
from normkit.functional.checked import normalize_switched
from normkit.layers.base import Device, TrackingLayer
from normkit.typing import FeatureMap


class SwitchableNorm(TrackingLayer):
    r"""Normalise by a learned mixture of instance, layer and batch statistics.

    .. math::  \mu = \sum_k softmax(a)_k \mu_k, \quad \sigma^2 = \sum_k softmax(b)_k \sigma_k^2,
               \quad y = \gamma_c \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_c

    over ``k`` in instance, layer, batch. The logits ``a`` are ``mean_logits``, ``b`` are
    ``var_logits``, in that order and equal at first.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        use_batch: Mix in the batch's statistics. Without, there are two logits and no running
            statistics: for batches of one.
        eps: Added to the variance; unit of ``x`` squared.
        momentum: Weight of the new value in the running statistics; None averages all batches.
        affine: Learn ``weight`` and ``bias``, ``(C,)`` each. The logits are always learned.
        bias: Whether ``affine`` learns a shift; if not, there is a scale alone.
        track_running_stats: Keep running statistics; without them evaluation uses the batch's.
        example_weight: Share of the example's own statistics in the batch part at evaluation.
        process_group: Whose batches count as one batch in training: a ``torch.distributed``
            group, ``"world"`` for all processes, or None for this process alone.
        device: Where parameters and buffers live.
        dtype: Of the parameters; buffers are at least float32.

    Raises:
        PartitionError: In training, if a channel, or without ``use_batch`` an example, has a
            single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        All three variances that are mixed are biased, so 1x1 maps have finite results; the running
        variance is unbiased and starts at 1.

    Source:
        Luo, Ren, Peng, Zhang & Li 2018, Differentiable Learning-to-Normalize via Switchable
        Normalization, arXiv:1806.10779.

    Example:
        >>> norm = SwitchableNorm(6)
        >>> norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """

    mean_logits: nn.Parameter
    var_logits: nn.Parameter

    def __init__(  # noqa: PLR0913 - torch's options
        self,
        num_features: int,
        *,
        use_batch: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        example_weight: float = 0.0,
        process_group: ProcessGroup = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._num_logits = 3 if use_batch else 2
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            bias=bias,
            track_running_stats=track_running_stats and use_batch,
            example_weight=example_weight,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )

    @property
    def use_batch(self) -> bool:
        """Whether the batch's statistics are mixed in."""
        return self._num_logits == 3

    def _register_parameters(self, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        super()._register_parameters(bias, device, dtype)
        for name in ("mean_logits", "var_logits"):
            values = torch.empty(self._num_logits, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(values))

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1, ``bias`` to 0, all logits to 1, and the statistics to 0 and 1."""
        super().reset_parameters()
        nn.init.ones_(self.mean_logits)
        nn.init.ones_(self.var_logits)

    def _normalize(self, x: FeatureMap, valid: Valid | None) -> FeatureMap:
        running, parameters = self._running(), self._affine()
        logits, name = (self.mean_logits, self.var_logits), type(self).__name__
        ranks = self._ranks(x) if self.use_batch else None
        return normalize_switched(
            x, running, self.training, parameters, *logits, name, ranks, valid
        )

    def _groups(self) -> Iterable[Partition]:
        if self._process_group is not None:
            return ()
        return (self.partitions["batch norm" if self.use_batch else "layer norm"],)

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share statistics in each of the norms, in training."""
        found = {
            "instance norm": Partition(num_groups=self.num_features, examples_per_group=1),
            "layer norm": Partition(num_groups=1, examples_per_group=1),
        }
        if self.use_batch:
            found["batch norm"] = Partition(num_groups=self.num_features)
        return found
