"""BatchChannelNorm: a batch norm, or running estimates for micro batches, then a group norm."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack, get_args

import torch
from torch import nn
from torch.nn.functional import batch_norm
from torch.optim import Optimizer

from normkit.core.check import (
    require_channel_groups,
    require_choice,
    require_update_rate,
)
from normkit.core.ending import Ending, ended
from normkit.core.groups import normalize_batch
from normkit.core.mask import Valid
from normkit.core.parameters import Parameters, empty_result
from normkit.core.partition import Partition
from normkit.core.ranks import ProcessGroup
from normkit.core.routes import batch_route, composite_route, stage_route
from normkit.core.running import Recent, Running, RunningEstimates
from normkit.core.stages import normalize_estimated
from normkit.functional.checked import normalize_batch_then_group, normalize_single
from normkit.kernels.select import Call
from normkit.layers.base import BUFFERS, NormLayer, StageOption, TrackingLayer, is_watched
from normkit.layers.options import Device, SharedOptions, stage_options
from normkit.layers.over_batch import InnerBatchNorm
from normkit.layers.parts import Part, Slot, tracked_parts
from normkit.passes import require_inspectable, run_cleanup
from normkit.typing import FeatureMap

ChannelAffine = Literal["group", "channel"]
NUM_RECENT = 8  # forwards whose estimates are kept for checkpoint recomputation


class BatchChannelNorm(NormLayer):
    r"""Normalise every channel over the batch, then runs of channels of every example.

    .. math::  \dot y = \gamma^b_c \frac{x - \hat\mu_c}{\sqrt{\hat\sigma_c^2 + \epsilon}}
               + \beta^b_c, \quad
               y = \gamma^c_g \frac{\dot y - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}} + \beta^c_g

    The batch stage is a ``BatchNorm`` with its own affine and running statistics. With
    ``micro_batch`` a training forward first updates running estimates with the batch and then
    normalises by them, so it works for batches of one or two; no gradient flows through the
    estimates.

    State-dict keys are ``batch.*`` (as in a ``BatchNorm``), ``channel.weight``, ``channel.bias``.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Number of runs of channels that the channel stage normalises; divides ``C``.
        micro_batch: Normalise by running estimates in training (Algorithm 1).
        update_rate: Weight of a micro batch in the estimates, in (0, 1]. The paper sets it to the
            learning rate at every step; ``sync_update_rates`` does that.
        channel_affine: ``"group"``: the channel stage learns one scale and shift per group
            (eq. 42), ``(num_groups,)``. ``"channel"``: one per channel, ``(C,)``.
        momentum: Weight of the new value in the batch stage's running statistics; None averages
            all batches. Not used with ``micro_batch``.
        example_weight: Share of the example's own statistics in the batch stage at evaluation.
        process_group: The processes whose batches count as one batch in training: a
            ``torch.distributed`` group, ``"world"`` for all, or None for this process alone.
        **shared: ``eps``, ``affine``, ``bias``, ``device`` and ``dtype``: see ``SharedOptions`` in
            ``normkit.layers.options``.

    Raises:
        PartitionError: If ``num_groups`` does not divide ``num_features``; in training, if a group
            or, without ``micro_batch``, a channel has a single value.
        OptionError: If ``update_rate`` lies outside (0, 1], or ``channel_affine`` is unknown.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        The channel stage's statistics are computed from the table of the batch stage. So there are
        two passes over the map, and backward keeps only ``x`` and tables (and a second map if a
        stage has a hook). The estimated variance of ``micro_batch`` is biased; otherwise the
        running variance is unbiased. During checkpoint recomputation the layer reuses the
        estimates of the first forward, if that was one of its last eight training forwards, and
        raises an ``InputError`` otherwise.

    Source:
        Qiao, Wang, Liu, Shen & Yuille, Micro-Batch Training with Batch-Channel Normalization and
        Weight Standardization, section 7 and Algorithm 1.

    Example:
        >>> norm = BatchChannelNorm(6, num_groups=3, micro_batch=True)
        >>> norm(torch.randn(1, 6, 5, 7)).shape
        torch.Size([1, 6, 5, 7])
    """

    takes_ending = True

    batch: InnerBatchNorm | EstimatedBatchNorm
    channel: ChannelStage
    eps = StageOption("batch", "channel")
    example_weight = StageOption("batch")
    process_group = StageOption("batch")

    def __init__(  # noqa: PLR0913 - torch's options and the method's own
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        micro_batch: bool = False,
        update_rate: float = 0.1,
        channel_affine: ChannelAffine = "group",
        momentum: float | None = 0.1,
        example_weight: float = 0.0,
        process_group: ProcessGroup = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        num_groups = require_channel_groups(num_groups, num_features)
        super().__init__(num_features, **shared)
        self.num_groups, self.micro_batch, self._momentum = num_groups, micro_batch, momentum
        self._update_rate = require_update_rate(update_rate)
        stage = {"example_weight": example_weight, "process_group": process_group}
        stage |= stage_options(shared)
        if micro_batch:
            self.batch = EstimatedBatchNorm(num_features, update_rate=update_rate, **stage)
        else:
            self.batch = InnerBatchNorm(num_features, momentum=momentum, **stage)
        self.channel = ChannelStage(
            num_features,
            num_groups=num_groups,
            channel_affine=channel_affine,
            **stage_options(shared),
        )

    def _register_parameters(self, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        """Register nothing, because the stages hold the parameters."""

    @property
    def has_shift(self) -> bool:
        """Whether the stages have a ``bias``."""
        return self.channel.has_shift

    def reset_parameters(self) -> None:
        """Set scales to 1, shifts to 0, and the running statistics to 0 and 1."""
        self.batch.reset_parameters()
        self.channel.reset_parameters()

    @property
    def update_rate(self) -> float:
        """Weight of a micro batch in the estimates, in (0, 1]."""
        stage = self.batch
        return stage.update_rate if isinstance(stage, EstimatedBatchNorm) else self._update_rate

    @update_rate.setter
    def update_rate(self, value: float) -> None:
        self._update_rate = require_update_rate(value)
        if isinstance(self.batch, EstimatedBatchNorm):
            self.batch.update_rate = value

    @property
    def momentum(self) -> float | None:
        """Weight of the new value in the running statistics; not used with ``micro_batch``."""
        stage = self.batch
        return stage.momentum if isinstance(stage, InnerBatchNorm) else self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = value
        if isinstance(self.batch, InnerBatchNorm):
            self.batch.momentum = value

    @property
    def channel_affine(self) -> ChannelAffine:
        """Whether the channel stage has one scale and shift per group or per channel."""
        return self.channel.channel_affine

    def _normalize(
        self, x: FeatureMap, valid: Valid | None, ending: Ending | None = None
    ) -> FeatureMap:
        stages: Any = self._modules  # read directly, for the reason given in _affine
        batch, channel = stages["batch"], stages["channel"]
        if is_watched(batch, channel):
            return ended(channel(batch(x, valid), valid), ending, valid)
        running, training = _tracked(batch), (batch.training, channel.training)
        parameters = (batch._affine(), channel._affine())
        ranks = None if batch._process_group is None else batch._ranks(x)
        groups, name = self.num_groups, type(self).__name__
        return normalize_batch_then_group(
            x, groups, running, training, *parameters, name, ranks, valid, ending
        )

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        if self.why_separate() is not None:
            return (*self.batch.routes(x, is_masked), *self.channel.routes(x, is_masked))
        running, is_part = _tracked(self.batch), self.batch._ranks(x) is not None
        return (composite_route(running, self.batch.training, is_part, is_masked, False),)

    def why_separate(self) -> str | None:
        """Why the next call computes the stages one after another, or None."""
        return "hooks watch one of them" if is_watched(self.batch, self.channel) else None

    def _groups_to_check(self) -> Iterable[Partition]:
        found, alone = self.partitions, self.process_group is None
        # Groups that span processes are checked after their statistics were exchanged.
        if not self.batch.training or not alone:
            found.pop("batch stage", None)
        return found.values() if self.channel.training else []

    def parts(self) -> tuple[Part, ...]:
        """The statistics that each stage normalises by in its present mode."""
        stages = {"batch stage": self.batch, "channel stage": self.channel}
        return tuple(replace(p, name=name) for name, s in stages.items() for p in s.parts())

    def affine_slots(self) -> tuple[Slot, ...]:
        """The last stage that holds one scale and shift per channel."""
        last = self.channel_affine == "channel"
        return (Slot(self.channel if last else self.batch, 0, self.num_features),)

    def last_affine_slots(self) -> tuple[Slot, ...]:
        """The channel stage."""
        return (Slot(self.channel, 0, self.num_features),)

    def statistics_slots(self) -> tuple[Slot, ...]:
        """The batch stage."""
        return (Slot(self.batch, 0, self.num_features),)

    def evaluated_stage(self) -> tuple[TrackingLayer, dict[str, nn.Module]] | None:
        """The batch stage, and the channel stage after it."""
        return self.batch, {"channel": self.channel}

    def input_of(self, part: nn.Module, x: FeatureMap, valid: Valid | None) -> FeatureMap | None:
        """A stage's input in float64; None if it also depends on other processes or a mixture."""
        stage = self.batch
        if part is stage:
            return x
        own = stage.training and not stage.is_estimated
        weighs = not stage.training and stage.example_weight
        if (own and stage.process_group is not None) or weighs:
            return None
        weight, bias = (None if p is None else p.double() for p in (stage.weight, stage.bias))
        if own:
            affine = Parameters(weight, bias, stage.eps)
            return normalize_batch(x.double(), stage.running_partition, None, affine, valid=valid)
        # With micro batches the forward has already updated the estimates it normalised by.
        mean, var = (stage.get_buffer(name).double() for name in BUFFERS)
        return batch_norm(x.double(), mean, var, weight, bias, False, 0.0, stage.eps)

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share statistics in each stage, in training."""
        channel = {"channel stage": self.channel.partition}
        if self.micro_batch:
            return channel
        return {"batch stage": Partition(num_groups=self.num_features)} | channel


class EstimatedBatchNorm(TrackingLayer):
    """Update running estimates with the batch, then normalise every channel by them.

    Without a stage before or after, for micro batches.
    """

    is_estimated = True

    def __init__(
        self,
        num_features: int,
        *,
        update_rate: float = 0.1,
        example_weight: float = 0.0,
        process_group: ProcessGroup = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            num_features,
            momentum=require_update_rate(update_rate),
            example_weight=example_weight,
            process_group=process_group,
            **shared,
        )
        self._recent: Recent = deque(maxlen=NUM_RECENT)

    @property
    def update_rate(self) -> float:
        """Weight of the new value in the estimates, in (0, 1]."""
        return require_update_rate(None) if self.momentum is None else self.momentum

    @update_rate.setter
    def update_rate(self, value: float) -> None:
        self.momentum = require_update_rate(value)

    def _normalize(self, x: FeatureMap, valid: Valid | None) -> FeatureMap:
        ranks = self._ranks(x)
        if x.numel() == 0 and ranks is None:
            return empty_result(x, self.weight, self.bias)
        affine = self._affine()
        return normalize_estimated(x, self.estimates(), self.training, affine, ranks, valid)

    def parts(self) -> tuple[Part, ...]:
        """The statistics that the layer normalises by in its present mode."""
        if self.training:
            return (Part(partition=self.running_partition, origin="estimates"),)
        return tracked_parts("statistics", self.running_partition, self)

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        return (stage_route(self._ranks(x) is not None, is_masked),)

    def estimates(self) -> RunningEstimates:
        """The buffers and their update rate, which is 0 if ``track_running_stats`` is off."""
        buffers: Any = self._buffers  # read directly, for the reason given in _affine
        mean, var = buffers["running_mean"], buffers["running_var"]
        rate = self.update_rate if self.track_running_stats else 0.0
        count, weight = buffers["num_batches_tracked"], self._example_weight
        return RunningEstimates(mean, var, count, rate, weight, self._recent)

    def __getstate__(self) -> dict[str, Any]:
        """State without the latest batches, which only a pending backward pass needs."""
        return super().__getstate__() | {"_recent": deque(maxlen=NUM_RECENT)}


class ChannelStage(NormLayer):
    """A group norm with one scale and shift per group or per channel."""

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int,
        channel_affine: ChannelAffine,
        **shared: Unpack[SharedOptions],
    ) -> None:
        require_choice("channel_affine", channel_affine, get_args(ChannelAffine))
        self.num_groups = num_groups
        self.channel_affine: ChannelAffine = channel_affine
        super().__init__(num_features, **shared)
        self.reset_parameters()

    @property
    def partition(self) -> Partition:
        """One group per run of channels and example."""
        return Partition(num_groups=self.num_groups, examples_per_group=1)

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share statistics."""
        return {"statistics": self.partition}

    def _num_affine_values(self) -> int:
        return self.num_groups if self.channel_affine == "group" else self.num_features

    def _normalize(self, x: FeatureMap, valid: Valid | None) -> FeatureMap:
        weight, bias, eps = self._affine()
        repeats = self.num_features // self._num_affine_values()
        scale, shift = (None if p is None else p.repeat_interleave(repeats) for p in (weight, bias))
        parameters, name = Parameters(scale, shift, eps), type(self).__name__
        return normalize_single(
            x, self.partition, None, parameters, self.training, name, valid=valid
        )

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        return (batch_route(None, False, is_masked),)

    def _groups_to_check(self) -> Iterable[Partition]:
        return (self.partition,)


def _tracked(stage: InnerBatchNorm | EstimatedBatchNorm) -> Running | None:
    return stage.estimates() if isinstance(stage, EstimatedBatchNorm) else stage._running()


def sync_update_rates(model: nn.Module, optimizer: Optimizer) -> None:
    """Set the update rate of every micro-batch layer to the learning rate, as the paper does.

    Call it before each step of the optimizer, after the scheduler's step.

    Args:
        model: Model with ``BatchChannelNorm`` layers; those without ``micro_batch`` stay as they
            are.
        optimizer: A layer takes the learning rate of the parameter group that holds its
            parameters, or of the first group if none does.

    Raises:
        OptionError: If a learning rate lies outside (0, 1], or the model hides its layers
            (scripted, exported, quantized); then nothing is changed.

    Source:
        Qiao, Wang, Liu, Shen & Yuille, Micro-Batch Training with Batch-Channel Normalization and
        Weight Standardization, section 7.

    Example:
        >>> norm = BatchChannelNorm(6, num_groups=3, micro_batch=True)
        >>> sync_update_rates(norm, torch.optim.SGD(norm.parameters(), lr=0.02))
        >>> norm.update_rate
        0.02
    """
    require_inspectable(model, "set the update rates of", sharded=True)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    first = optimizer.param_groups[0]["lr"]
    layers = [m for m in model.modules() if isinstance(m, BatchChannelNorm) and m.micro_batch]
    found = [next((rates[id(p)] for p in m.parameters() if id(p) in rates), first) for m in layers]
    new = [require_update_rate(float(rate)) for rate in found]
    pairs = zip(layers, new, strict=True)
    run_cleanup(partial(setattr, layer, "update_rate", rate) for layer, rate in pairs)
