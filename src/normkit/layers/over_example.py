"""Layers that take statistics within one example: instance, layer, group and positional."""

from __future__ import annotations

from typing import Unpack

from normkit.core.check import require_channel_groups
from normkit.core.ending import Ending
from normkit.core.mask import Valid
from normkit.core.partition import Partition
from normkit.core.ranks import ProcessGroup
from normkit.core.routes import POSITIONAL
from normkit.functional.checked import normalize_positional
from normkit.kernels.select import Call
from normkit.layers.base import NormLayer, SegmentLayer
from normkit.layers.options import SharedOptions, TrackingOptions
from normkit.layers.parts import Part
from normkit.typing import FeatureMap


class ExampleLayer(SegmentLayer):
    """A layer that by default normalises by the example's own statistics, also at evaluation."""

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        track_running_stats: bool = False,
        example_weight: float = 1.0,
        process_group: ProcessGroup = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            num_features,
            momentum=momentum,
            track_running_stats=track_running_stats,
            example_weight=example_weight,
            process_group=process_group,
            **shared,
        )


class InstanceNorm(ExampleLayer):
    r"""Normalise every channel of every example over its positions.

    .. math::  y = \gamma_c \frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}} + \beta_c

    Training and evaluation are the same, unless ``example_weight`` is below 1. Unlike
    ``torch.nn.InstanceNorm2d`` the layer is affine by default and keeps the memory format.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        track_running_stats: Keep whole-batch statistics per channel for ``example_weight``.
        example_weight: Share of the example's own statistics at evaluation; 1 uses them alone.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``process_group``, ``device`` and
            ``dtype``: see ``TrackingOptions`` in ``normkit.layers.options``.

    Raises:
        PartitionError: In training, if a channel of an example has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance, at least float32.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016, Instance Normalization: The Missing Ingredient for Fast
        Stylization, arXiv:1607.08022.

    Example:
        >>> import torch
        >>> norm = InstanceNorm(6)
        >>> norm(torch.randn(1, 6, 5, 7)).mean(dim=(2, 3)).abs().max() < 1e-6
        tensor(True)
    """

    @property
    def partition(self) -> Partition:
        """One group per channel and example."""
        return Partition(num_groups=self.num_features, examples_per_group=1)


class LayerNorm(ExampleLayer):
    r"""Normalise every example over all its channels and positions.

    .. math::  y = \gamma_c \frac{x - \mu_n}{\sqrt{\sigma_n^2 + \epsilon}} + \beta_c

    This is layer normalization of a feature map: ``GroupNorm`` with one group, with one scale and
    shift per channel. ``torch.nn.LayerNorm`` on channels-last tokens is ``PositionalNorm``.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        track_running_stats: Keep whole-batch statistics per channel for ``example_weight``.
        example_weight: Share of the example's own statistics at evaluation; 1 uses them alone.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``process_group``, ``device`` and
            ``dtype``: see ``TrackingOptions`` in ``normkit.layers.options``.

    Raises:
        PartitionError: In training, if an example has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance, at least float32.

    Source:
        Ba, Kiros & Hinton 2016, Layer Normalization, arXiv:1607.06450.

    Example:
        >>> import torch
        >>> norm = LayerNorm(6)
        >>> norm(torch.randn(1, 6, 5, 7)).mean().abs() < 1e-6
        tensor(True)
    """

    @property
    def partition(self) -> Partition:
        """One group per example."""
        return Partition(num_groups=1, examples_per_group=1)


class GroupNorm(ExampleLayer):
    r"""Normalise runs of ``C / num_groups`` channels of every example.

    .. math::  y = \gamma_c \frac{x - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}} + \beta_c

    Unlike in ``torch.nn.GroupNorm`` the number of channels comes first, so the class works as
    ``norm_layer=``.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Number of runs of channels; divides ``C``.
        track_running_stats: Keep whole-batch statistics per channel for ``example_weight``.
        example_weight: Share of the example's own statistics at evaluation; 1 uses them alone.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``process_group``, ``device`` and
            ``dtype``: see ``TrackingOptions`` in ``normkit.layers.options``.

    Raises:
        PartitionError: If ``num_groups`` does not divide ``num_features``; in training, if a group
            has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance, at least float32.

    Source:
        Wu & He 2018, Group Normalization, arXiv:1803.08494, eq. 7.

    Example:
        >>> import torch
        >>> norm = GroupNorm(6, num_groups=3)
        >>> norm(torch.randn(1, 6, 5, 7))[:, :2].mean().abs() < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        num_groups = require_channel_groups(num_groups, num_features)
        super().__init__(num_features, **shared)
        self.num_groups = num_groups

    @property
    def partition(self) -> Partition:
        """One group per run of channels and example."""
        return Partition(num_groups=self.num_groups, examples_per_group=1)


class PositionalNorm(NormLayer):
    r"""Normalise every position of every example over its channels.

    .. math::  y = \gamma_c \frac{x - \mu_{ns}}{\sqrt{\sigma_{ns}^2 + \epsilon}} + \beta_c

    There are no running statistics; training and evaluation are the same.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        **shared: ``eps``, ``affine``, ``bias``, ``device`` and ``dtype``: see ``SharedOptions`` in
            ``normkit.layers.options``.

    Raises:
        PartitionError: In training, if there is a single channel.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance, at least float32.

    Source:
        Li, Wu, Weinberger & Belongie 2019, Positional Normalization, arXiv:1907.04312; without the
        re-injection path, as in Zhou et al., Batch Group Normalization.

    Example:
        >>> import torch
        >>> norm = PositionalNorm(6)
        >>> norm(torch.randn(1, 6, 5, 7)).mean(dim=1).abs().max() < 1e-6
        tensor(True)
    """

    takes_ending = True

    def __init__(
        self,
        num_features: int,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(num_features, **shared)
        self.reset_parameters()

    def parts(self) -> tuple[Part, ...]:
        """The statistics of each position of each example."""
        return (Part(partition=None),)

    def _normalize(
        self, x: FeatureMap, valid: Valid | None, ending: Ending | None = None
    ) -> FeatureMap:
        name = type(self).__name__
        return normalize_positional(x, self._affine(), self.training, name, valid, ending)

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        return (POSITIONAL,)
