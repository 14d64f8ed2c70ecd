"""GroupWhitening: decorrelate the groups of channels within each example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

from normkit.core.check import require_channel_groups, require_count
from normkit.core.mask import Valid
from normkit.core.partition import Partition
from normkit.core.routes import WHITENING
from normkit.functional.checked import whiten
from normkit.kernels.select import Call
from normkit.layers.base import NormLayer
from normkit.layers.options import SharedOptions
from normkit.typing import FeatureMap


class GroupWhitening(NormLayer):
    r"""Whiten the groups of channels of every example, by Newton's iteration.

    .. math::  \Sigma = \tfrac{1}{m} X X^T + \epsilon I, \quad
               P_0 = I, \quad P_{k+1} = \tfrac{3}{2} P_k - \tfrac{1}{2} P_k^3
               \frac{\Sigma}{tr \Sigma}, \quad
               Y = \frac{P_T}{\sqrt{tr \Sigma}} X

    where ``X`` is an example's map as ``num_groups`` centred rows of ``m`` elements; each row is a
    run of channels. Afterwards every channel is scaled and shifted.

    The method needs products of different channels, which the table of moments does not have. So it
    is computed in plain torch operators, and autograd keeps several maps for backward.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Number of runs of channels, which are decorrelated; divides ``C``.
        iterations: Newton steps. After five steps 64 groups are still far from white (by about a
            half), as the method intends.
        **shared: ``eps``, ``affine``, ``bias``, ``device`` and ``dtype``: see ``SharedOptions`` in
            ``normkit.layers.options``.

    Raises:
        PartitionError: If ``num_groups`` does not divide ``num_features``; in training, if a row
            has a single value.
        InputError: If the input is not ``(N, C, *S)`` with ``C = num_features``.
        InputTypeError: If it is not float32, float64, bfloat16 or float16.

    Numerics:
        At least float32, also under autocast. ``eps`` is added before the trace is taken, so
        constant input has a finite result.

    Source:
        Huang, Zhou, Liu, Zhu & Shao 2021, Group Whitening: Balancing Learning Efficiency and
        Representational Capacity, arXiv:2009.13333; used as a batch-free norm in Huang et al.,
        Delving into the Estimation Shift of Batch Normalization in a Network.

    Example:
        >>> import torch
        >>> norm = GroupWhitening(6, num_groups=3)
        >>> norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        iterations: int = 5,
        **shared: Unpack[SharedOptions],
    ) -> None:
        self.num_groups = require_channel_groups(num_groups, num_features)
        self.iterations = require_count("iterations", iterations)
        super().__init__(num_features, **shared)
        self.reset_parameters()

    @property
    def partition(self) -> Partition:
        """The rows that are centred and decorrelated."""
        return Partition(num_groups=self.num_groups, examples_per_group=1)

    @property
    def partitions(self) -> dict[str, Partition]:
        """Which elements share means, and which covariances."""
        example = Partition(num_groups=1, examples_per_group=1)
        return {"means": self.partition, "covariances": example}

    def _normalize(self, x: FeatureMap, valid: Valid | None) -> FeatureMap:
        parameters, training, name = self._affine(), self.training, type(self).__name__
        return whiten(x, self.num_groups, self.iterations, parameters, training, name, valid)

    def routes(self, x: FeatureMap, is_masked: bool) -> tuple[Call, ...]:
        """What decides which kernels compute each part of a call on ``x``; ``explain`` uses it."""
        return (WHITENING,)

    def _groups_to_check(self) -> Iterable[Partition]:
        return (self.partition,)
