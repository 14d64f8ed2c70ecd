"""InstanceBatchNorm: instance norm on the first channels, batch norm on the rest (IBN-a)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import nn

from normkit.core.check import require_count
from normkit.core.ending import Ending, ended
from normkit.core.mask import Mask, Valid, require_valid_values
from normkit.core.partition import Partition
from normkit.core.ranks import ProcessGroup
from normkit.core.routes import composite_route
from normkit.errors import OptionError
from normkit.functional.checked import normalize_instance_beside_batch
from normkit.kernels.select import Call
from normkit.layers.base import NormLayer, StageOption, is_watched
from normkit.layers.options import Device, SharedOptions, stage_options
from normkit.layers.over_batch import InnerBatchNorm
from normkit.layers.over_example import InstanceNorm
from normkit.layers.parts import Part, Slot
from normkit.typing import FeatureMap


class InstanceBatchNorm(NormLayer):
    r"""Normalise the first channels within each example, the rest over the whole batch.

    .. math::  y_c = IN(x)_c \text{ for } c < h, \quad y_c = BN(x)_c \text{ for } c \ge h, \quad
               h = \lfloor ratio \cdot C \rfloor

    State-dict keys are ``instance.*`` (as in an ``InstanceNorm``) and ``batch.*`` (as in a
    ``BatchNorm``).

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        ratio: Share of the channels that the instance norm takes; at least one goes to each norm.
        momentum: Weight of the new value in the running statistics; None averages all batches.
        example_weight: Share of the example's own statistics in the batch norm at evaluation.
        process_group: The processes whose batches count as one batch in training: a
            ``torch.distributed`` group, ``"world"`` for all, or None for this process alone.
        **shared: ``eps``, ``affine``, ``bias``, ``device`` and ``dtype``: see ``SharedOptions`` in
            ``normkit.layers.options``.

    Raises:
        PartitionError: In training, if a channel of an example has a single value.
        OptionError: If ``ratio`` leaves no channel to one of the norms.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Both norms share the same two passes over the map; backward keeps only ``x`` and tables.

    Source:
        Pan, Luo, Shi & Tang 2018, Two at Once: Enhancing Learning and Generalization Capacities via
        IBN-Net, arXiv:1807.09441.

    Example:
        >>> norm = InstanceBatchNorm(6)
        >>> norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """

    takes_ending = True

    instance: InstanceNorm
    batch: InnerBatchNorm
    eps = StageOption("batch", "instance")
    momentum = StageOption("batch", "instance")
    example_weight = StageOption("batch")
    process_group = StageOption("batch")

    def __init__(
        self,
        num_features: int,
        *,
        ratio: float = 0.5,
        momentum: float | None = 0.1,
        example_weight: float = 0.0,
        process_group: ProcessGroup = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        half = instance_channels(require_count("num_features", num_features), ratio)
        super().__init__(num_features, **shared)
        self.ratio = ratio
        shared = stage_options(shared)
        self.instance = InstanceNorm(half, momentum=momentum, **shared)
        self.batch = InnerBatchNorm(
            num_features - half,
            momentum=momentum,
            example_weight=example_weight,
            process_group=process_group,
            **shared,
        )

    def _register_parameters(self, bias: bool, device: Device, dtype: torch.dtype | None) -> None:
        """Register nothing, because the two norms hold the parameters."""

    @property
    def has_shift(self) -> bool:
        """Whether the two norms have a ``bias``."""
        return self.batch.has_shift

    def reset_parameters(self) -> None:
        """Set ``weight`` to 1, ``bias`` to 0, and the running statistics to 0 and 1."""
        self.instance.reset_parameters()
        self.batch.reset_parameters()

    def _normalize(
        self, x: FeatureMap, valid: Valid | None, ending: Ending | None = None
    ) -> FeatureMap:
        norms: Any = self._modules  # read directly, for the reason given in _affine
        instance, batch = norms["instance"], norms["batch"]
        half, name = instance.num_features, type(self).__name__
        if is_watched(instance, batch):
            halves = instance(x[:, :half], valid), batch(x[:, half:], valid)
            return ended(torch.cat(halves, dim=1), ending, valid)
        training = (instance.training, batch.training)
        parameters, running = (instance._affine(), batch._affine()), batch._running()
        ranks = None if batch._process_group is None else batch._ranks(x)
        return normalize_instance_beside_batch(
            x, half, running, training, *parameters, name, ranks, valid, ending
        )

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        running, training = self.batch._running(), self.batch.training
        is_apart = is_masked and not training and running is not None
        if is_apart or self.why_separate() is not None:
            return (*self.instance.routes(x, is_masked), *self.batch.routes(x, is_masked))
        is_part = self.batch._ranks(x) is not None
        return (composite_route(running, training, is_part, is_masked, True),)

    def why_separate(self) -> str | None:
        """Why the next call computes the norms one after another, or None."""
        return "hooks watch one of them" if is_watched(self.instance, self.batch) else None

    def _read_mask(self, mask: Mask, x: FeatureMap) -> Valid:
        valid = super()._read_mask(mask, x)
        for norm in (self.instance, self.batch):
            if norm.training and x.numel():
                shape = (x.shape[0], norm.num_features, *x.shape[2:])
                require_valid_values(norm._groups_to_check(), valid, shape, type(self).__name__)
        return valid

    @property
    def needs_positions(self) -> bool:
        """True, as for the instance norm."""
        return True

    def affine_slots(self) -> tuple[Slot, ...]:
        """The instance norm for the first channels, the batch norm for the others."""
        half = self.instance.num_features
        return Slot(self.instance, 0, half), Slot(self.batch, half, self.num_features)

    def statistics_slots(self) -> tuple[Slot, ...]:
        """The batch norm, which holds those of its channels."""
        return self.affine_slots()[1:]

    def input_of(self, part: nn.Module, x: FeatureMap, valid: Valid | None) -> FeatureMap | None:
        """The channels that one of the norms takes."""
        half = self.instance.num_features
        return x[:, :half] if part is self.instance else x[:, half:]

    def parts(self) -> tuple[Part, ...]:
        """The statistics that each norm normalises by in its present mode, and its channels."""
        names = ("instance norm", "batch norm")
        return tuple(
            replace(part, name=name, channels=(slot.start, slot.end))
            for name, slot in zip(names, self.affine_slots(), strict=True)
            for part in slot.layer.parts()
        )

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share statistics in each norm's part of the channels, in training."""
        instance, batch = self.instance.num_features, self.batch.num_features
        return {
            "instance norm": Partition(num_groups=instance, examples_per_group=1),
            "batch norm": Partition(num_groups=batch),
        }


def instance_channels(num_features: int, ratio: float) -> int:
    """Channels that the instance norm takes.

    Raises:
        OptionError: If one of the norms would have none.
    """
    half = int(num_features * ratio) if 0 < ratio < 1 else 0
    if not 0 < half < num_features:
        raise OptionError(
            f"ratio={ratio} of {num_features} channels was given; it leaves one of the norms "
            f"without a channel; there must be two channels at least, and the ratio lies from "
            f"1 / num_features to below 1"
        )
    return half
