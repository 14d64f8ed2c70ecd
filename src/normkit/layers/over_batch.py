"""Layers whose statistics are taken over several examples: batch, BGN, ghost and GBGN."""

from __future__ import annotations

from typing import Unpack

from torch.nn.modules.batchnorm import _BatchNorm

from normkit.core.check import require_channel_groups, require_count
from normkit.core.partition import Partition
from normkit.layers.base import SegmentLayer
from normkit.layers.options import TrackingOptions
from normkit.layers.rebuilt import RefusingEps


class InnerBatchNorm(SegmentLayer):
    """A batch norm inside a composite.

    It is not a ``_BatchNorm``, because tools that replace those would change one stage of a
    composite.
    """

    @property
    def partition(self) -> Partition:
        """One group per channel, over the whole batch."""
        return Partition(num_groups=self.num_features)


class BatchNorm(InnerBatchNorm, _BatchNorm):  # pyright: ignore[reportIncompatibleMethodOverride]
    r"""Normalise every channel over the whole batch.

    .. math::  y = \gamma_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + \beta_c

    Training uses the batch's statistics, evaluation the running ones. State dict, buffers and
    results are those of ``torch.nn.BatchNorm1d/2d/3d``, for any number of spatial axes. The class
    is a subclass of their base class ``_BatchNorm``, so tools that look for that class find it.
    While the layer has an activation, tools that would replace it by a layer without one are
    refused.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``track_running_stats``,
            ``example_weight``, ``process_group``, ``device`` and ``dtype``: see ``TrackingOptions``
            in ``normkit.layers.options``.

    Raises:
        PartitionError: In training, if a channel has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance normalises, unbiased variance is tracked; both at least float32.

    Source:
        Ioffe & Szegedy 2015, Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift, arXiv:1502.03167, algorithms 1 and 2; example weighing: Summers &
        Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, eq. 3.

    Example:
        >>> import torch
        >>> norm = BatchNorm(6)
        >>> norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """

    eps = RefusingEps()  # type: ignore[assignment]
    _eps: float  # set with it

    def _lost_by_others(self) -> str | None:
        """The part of this layer that a batch norm of another library would not have."""
        return None if self.activation is None else f"activation={self.activation!r}"


class BatchGroupNorm(SegmentLayer):
    r"""Normalise equal runs of the flattened ``(C, *S)`` axis over the whole batch.

    With :math:`D = C \cdot \prod S`, group :math:`g` has the elements
    :math:`g D/G \ldots (g+1) D/G - 1` of every example:

    .. math::  y = \gamma_c \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta_c

    ``num_groups`` need not divide ``C``: a group may be a part of a channel or many channels.
    ``num_groups = C`` is ``BatchNorm``. Evaluation uses the running statistics, ``(G,)``, also on
    maps of another spatial size: group boundaries are fractions of the map.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Groups ``G``; divides ``D``. The paper's choice for batches of 128, 64, 32, 16,
            8, 4, 2 and 1 examples is 512, 256, 128, 64, 16, 2, 1 and 1; see ``bgn:auto`` in
            :class:`normkit.NormSpec`. The default suits the smallest batches.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``track_running_stats``,
            ``example_weight``, ``process_group``, ``device`` and ``dtype``: see ``TrackingOptions``
            in ``normkit.layers.options``.

    Raises:
        PartitionError: If ``num_groups`` does not divide ``D``; in training, if a group has a
            single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance normalises, unbiased variance is tracked; both at least float32.

    Source:
        Zhou et al., Batch Group Normalization, eqs. 8-9 (with ``S = D/G``, the reading that fits
        its own examples) and table 2.

    Example:
        >>> import torch
        >>> norm = BatchGroupNorm(6, num_groups=14)  # does not divide 6, but 6 * 5 * 7
        >>> norm(torch.randn(4, 6, 5, 7)).shape, norm.running_mean.shape
        (torch.Size([4, 6, 5, 7]), torch.Size([14]))
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 1,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        self.num_groups = require_count("num_groups", num_groups)
        super().__init__(num_features, **shared)

    @property
    def partition(self) -> Partition:
        """One group per run of the flattened ``(C, *S)`` axis, over the whole batch."""
        return Partition(num_groups=self.num_groups)

    @property
    def running_partition(self) -> Partition:
        """The buffers have one value per group."""
        return self.partition


class GhostBatchNorm(SegmentLayer):
    r"""Normalise every channel over runs of ``ghost_batch_size`` consecutive examples.

    .. math::  y = \gamma_c \frac{x - \mu_{bc}}{\sqrt{\sigma_{bc}^2 + \epsilon}} + \beta_c,
               \quad b = \lfloor n / B' \rfloor

    If the last run is smaller, it is normalised by its own statistics. The running statistics are
    those of the whole batch, so evaluation and the state dict are those of ``BatchNorm``.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        ghost_batch_size: Examples ``B'`` in a ghost batch; a smaller batch is one group.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``track_running_stats``,
            ``example_weight``, ``process_group``, ``device`` and ``dtype``: see ``TrackingOptions``
            in ``normkit.layers.options``.

    Raises:
        PartitionError: In training, if a channel of a ghost batch has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance normalises, unbiased variance is tracked; both at least float32.

    Source:
        Hoffer, Hubara & Soudry 2017, Train longer, generalize better: closing the generalization
        gap in large batch training of neural networks, arXiv:1705.08741; Summers & Dinneen, Four
        Things Everyone Should Know to Improve Batch Normalization, eq. 4.

    Example:
        >>> import torch
        >>> norm = GhostBatchNorm(6, ghost_batch_size=2)
        >>> norm(torch.randn(5, 6, 5, 7))[:2].mean().abs() < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        *,
        ghost_batch_size: int = 32,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        ghost_batch_size = require_count("ghost_batch_size", ghost_batch_size)
        super().__init__(num_features, **shared)
        self.ghost_batch_size = ghost_batch_size

    @property
    def partition(self) -> Partition:
        """One group per channel and ghost batch."""
        return Partition(num_groups=self.num_features, examples_per_group=self.ghost_batch_size)


class GeneralBatchGroupNorm(SegmentLayer):
    r"""Normalise runs of channels over runs of consecutive examples.

    .. math::  y = \gamma_c \frac{x - \mu_{bg}}{\sqrt{\sigma_{bg}^2 + \epsilon}} + \beta_c

    With one example per group it is ``GroupNorm`` in training, with ``num_groups = C`` it is
    ``GhostBatchNorm``.
    The running statistics are per channel over the whole batch, as in ``BatchNorm``; evaluation
    pools them into the channel groups by the law of total variance.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Number of runs of channels; divides ``C``.
        examples_per_group: Examples in a run; the last run may be smaller. None is the whole
            batch.
        **shared: ``eps``, ``momentum``, ``affine``, ``bias``, ``track_running_stats``,
            ``example_weight``, ``process_group``, ``device`` and ``dtype``: see ``TrackingOptions``
            in ``normkit.layers.options``.

    Raises:
        PartitionError: If ``num_groups`` does not divide ``num_features``; in training, if a group
            has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        Biased variance normalises, unbiased variance is tracked; both at least float32.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization,
        section 3.4.

    Example:
        >>> import torch
        >>> norm = GeneralBatchGroupNorm(6, num_groups=3, examples_per_group=2)
        >>> norm(torch.randn(4, 6, 5, 7))[:2, :2].mean().abs() < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        examples_per_group: int | None = None,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        num_groups = require_channel_groups(num_groups, num_features)
        if examples_per_group is not None:
            examples_per_group = require_count("examples_per_group", examples_per_group)
        super().__init__(num_features, **shared)
        self.num_groups = num_groups
        self.examples_per_group = examples_per_group

    @property
    def partition(self) -> Partition:
        """One group per run of channels and run of examples."""
        return Partition(num_groups=self.num_groups, examples_per_group=self.examples_per_group)
