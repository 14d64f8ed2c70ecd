"""GroupNormPlus: group norm and batch norm, mixed by a learned share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack, get_args

import torch
from torch import Tensor, nn

from normkit.core.check import (
    require_channel_groups,
    require_choice,
    require_share,
)
from normkit.core.composite import Order
from normkit.core.ending import Ending
from normkit.core.groups import normalize_batch
from normkit.core.mask import Valid
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.routes import composite_route
from normkit.functional.checked import normalize_group_and_batch
from normkit.kernels.select import Call
from normkit.layers.base import TrackingLayer
from normkit.layers.options import Device, TrackingOptions
from normkit.layers.parts import Part, tracked_parts
from normkit.typing import FeatureMap


class GroupNormPlus(TrackingLayer):
    r"""Mix group norm and batch norm by a learned share.

    .. math::  y = (s \cdot GN + (1 - s) \cdot BN) \gamma_c + \beta_c, \quad
               s = sigmoid(mix\_logit)

    =================  =========  ================
    ``order``          GN of      BN of
    =================  =========  ================
    ``"group-first"``  ``x``      GN's output
    ``"batch-first"``  BN's out.  ``x``
    ``"parallel"``     ``x``      ``x``
    =================  =========  ================

    Neither norm has an affine of its own. BN uses the batch's statistics in training and running
    ones at evaluation; for ``"group-first"`` these are statistics of GN's output. ``mix_logit``
    starts at 1, so ``s = 0.731``; it is learned with ``affine=False`` too. Two of the three orders
    diverged in the paper's experiments.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Number of runs of channels that GN normalises; divides ``C``.
        order: Which norm feeds which; see the table.
        mix_rate: Factor on the gradient of ``mix_logit``, from 0 to 1. The paper avoids divergence
            by a small rate; 0 freezes ``mix_logit``.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``track_running_stats``,
            ``example_weight``, ``process_group``, ``device`` and ``dtype``: see ``TrackingOptions``
            in ``normkit.layers.options``.

    Raises:
        PartitionError: If ``num_groups`` does not divide ``num_features``; in training, if a group
            or a channel has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.
        OptionError: If there is no such ``order``, or ``mix_rate`` lies outside 0 to 1.

    Numerics:
        The second norm's statistics are computed from the table of the first. So there are two
        passes over the map, and backward keeps only ``x`` and tables.

    Source:
        Gunawan, Yin & Zhang, Understanding and Improving Group Normalization, section 4.

    Example:
        >>> norm = GroupNormPlus(6, num_groups=3)
        >>> norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """

    takes_ending = True

    mix_logit: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        order: Order = "group-first",
        mix_rate: float = 1.0,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        require_share("mix_rate", mix_rate)
        require_choice("order", order, get_args(Order))
        num_groups = require_channel_groups(num_groups, num_features)
        super().__init__(num_features, **shared)
        self.num_groups, self.mix_rate = num_groups, mix_rate
        self.order: Order = order

    def _register_parameters(self, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        super()._register_parameters(bias, device, dtype)
        one = torch.empty(1, device=device, dtype=dtype)  # sharding refuses scalars
        self.mix_logit = nn.Parameter(one)

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1, ``bias`` to 0, ``mix_logit`` to 1, and the statistics to 0 and 1."""
        super().reset_parameters()
        nn.init.ones_(self.mix_logit)

    def _normalize(
        self, x: FeatureMap, valid: Valid | None, ending: Ending | None = None
    ) -> FeatureMap:
        groups, order, training = self.num_groups, self.order, self.training
        running, parameters, logit = self._running(), self._affine(), self._slowed_logit()
        name = type(self).__name__
        ranks = None if self._process_group is None else self._ranks(x)
        return normalize_group_and_batch(
            x, groups, order, running, training, parameters, logit, name, ranks, valid, ending
        )

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        running, is_part = self._running(), self._ranks(x) is not None
        return (composite_route(running, self.training, is_part, is_masked, False),)

    def _groups_to_check(self) -> Iterable[Partition]:
        alone = self._process_group is None
        return [p for p in self.partitions.values() if alone or p.examples_per_group == 1]

    def parts(self) -> tuple[Part, ...]:
        """The statistics that each norm normalises by in its present mode."""
        found = self.partitions
        group = Part(name="group norm", partition=found["group norm"])
        return (group, *tracked_parts("batch norm", found["batch norm"], self))

    @property
    def tracks_its_input(self) -> bool:
        """Whether the batch norm sees the input, not the group norm's output."""
        return self.order != "group-first"

    def tracked_input(self, x: FeatureMap, valid: Valid | None) -> FeatureMap:
        """The map whose statistics the buffers track: the group norm's output if that is first."""
        if self.tracks_its_input:
            return x
        alone = Parameters(None, None, self.eps)
        return normalize_batch(x, self.partitions["group norm"], None, alone, valid=valid)

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share statistics in each of the two norms, in training."""
        return {
            "group norm": Partition(num_groups=self.num_groups, examples_per_group=1),
            "batch norm": Partition(num_groups=self.num_features),
        }

    def _slowed_logit(self) -> Tensor:
        if self.mix_rate == 1:
            return self.mix_logit
        fixed = self.mix_logit.detach()
        return fixed + self.mix_rate * (self.mix_logit - fixed)
