"""SwitchableNorm: statistics of instance, layer and batch norm, mixed by learned shares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

import torch
from torch import nn

from normkit.core.ending import Ending
from normkit.core.mask import Valid
from normkit.core.partition import Partition
from normkit.core.routes import composite_route
from normkit.functional.checked import normalize_switched
from normkit.kernels.select import Call
from normkit.layers.base import TrackingLayer
from normkit.layers.options import Device, TrackingOptions
from normkit.layers.parts import Part, tracked_parts
from normkit.typing import FeatureMap


class SwitchableNorm(TrackingLayer):
    r"""Normalise by a learned mixture of instance, layer and batch statistics.

    .. math::  \mu = \sum_k softmax(a)_k \mu_k, \quad \sigma^2 = \sum_k softmax(b)_k \sigma_k^2,
               \quad y = \gamma_c \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_c

    over ``k`` in instance, layer, batch, in that order. The logits ``a`` are ``mean_logits``, ``b``
    are ``var_logits``; all start at 1, and they are learned with ``affine=False`` too.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        use_batch: Mix in the batch's statistics. False, for batches of one: there are two logits
            and no running statistics.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``track_running_stats``,
            ``example_weight``, ``process_group``, ``device`` and ``dtype``: see ``TrackingOptions``
            in ``normkit.layers.options``.

    Raises:
        PartitionError: In training, if a channel, or without ``use_batch`` an example, has a
            single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        The three mixed variances are biased, so results are finite on 1x1 maps. The running
        variance is unbiased and starts at 1.

    Source:
        Luo, Ren, Peng, Zhang & Li 2018, Differentiable Learning-to-Normalize via Switchable
        Normalization, arXiv:1806.10779.

    Example:
        >>> norm = SwitchableNorm(6)
        >>> norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """

    takes_ending = True

    mean_logits: nn.Parameter
    var_logits: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        use_batch: bool = True,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        self._num_logits = 3 if use_batch else 2
        shared["track_running_stats"] = use_batch and shared.get("track_running_stats", True)
        super().__init__(num_features, **shared)

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

    def _normalize(
        self, x: FeatureMap, valid: Valid | None, ending: Ending | None = None
    ) -> FeatureMap:
        running, parameters = self._running(), self._affine()
        logits, name = (self.mean_logits, self.var_logits), type(self).__name__
        is_part = self._process_group is not None and self.use_batch
        ranks = self._ranks(x) if is_part else None
        return normalize_switched(
            x, running, self.training, parameters, *logits, name, ranks, valid, ending
        )

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        running = self._running() if self.use_batch else None
        is_part = self.use_batch and self._ranks(x) is not None
        return (composite_route(running, self.training, is_part, is_masked, False),)

    def _groups_to_check(self) -> Iterable[Partition]:
        if self._process_group is not None:
            return ()
        return (self.partitions["batch norm" if self.use_batch else "layer norm"],)

    def parts(self) -> tuple[Part, ...]:
        """The statistics that each norm normalises by in the present mode."""
        found = self.partitions
        batch = found.pop("batch norm", None)
        own = [Part(name=name, partition=partition) for name, partition in found.items()]
        return (*own, *(tracked_parts("batch norm", batch, self) if batch else ()))

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
