"""Reparametrisations as modules for ``torch.nn.utils.parametrize``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.moments import Moments
from normkit.core.normalize import normalize
from normkit.core.transforms import needs_plain_formula
from normkit.kernels import reference
from normkit.weights.algebra import EpsTo, FilterAlgebra, Standardize, UnitLength
from normkit.weights.cache import Result, WeightCache
from normkit.weights.filters import Filters
from normkit.weights.functional import LENGTH_EPS, reparametrize, require_spread, require_weight


class Reparametrization(nn.Module, ABC):
    """Computes a layer's weight from a raw weight, with an optional gain and offset of each filter.

    Assigning to the layer's ``weight`` sets the raw weight.
    """

    gain: nn.Parameter | None
    offset: nn.Parameter | None

    def __init__(self, weight: Tensor, filters: Filters) -> None:
        super().__init__()
        require_weight(weight, filters, None, None)
        self.filters = filters
        self.fan_in = filters.fan_in(weight)
        self.cache: WeightCache | None = None
        self.register_parameter("gain", None)
        self.register_parameter("offset", None)

    @property
    @abstractmethod
    def algebra(self) -> FilterAlgebra:
        """The scale and center of each filter as a function of its moments."""

    def forward(self, weight: Tensor) -> Tensor:
        """Compute the layer's weight from the raw one; same shape, dtype and memory format."""
        if self.cache is None or needs_plain_formula():
            return reparametrize(weight, self.filters, self.algebra, *self.gain_and_offset())

        def compute(known: Result | None) -> Result:
            rows, affine = self.filters.rows(weight), self.gain_and_offset()
            return normalize(rows, self.fan_in, self.algebra, *affine, known=known)

        sources = (weight, *self._parameters.values())
        return self.filters.weight(self.cache.value(self, sources, compute), weight)

    def gain_and_offset(self) -> tuple[Tensor | None, Tensor | None]:
        """Compute what each filter is multiplied by, and what is then added; None is 1 and 0."""
        return self.gain, self.offset

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the raw weight for a weight that is assigned to the layer: the same tensor."""
        return weight

    def extra_repr(self) -> str:
        """List the options of the constructor and the learned parameters."""
        shown = ("center", "scale", "eps", "unbiased", "eps_to")
        options = [f"{name}={getattr(self, name)!r}" for name in shown if hasattr(self, name)]
        parameters = [name for name, _ in self.named_parameters(recurse=False)]
        return ", ".join([*options, *(f"{name}=True" for name in parameters)])

    def _moments(self, weight: Tensor) -> Moments:
        rows = self.filters.rows(weight.detach())
        return Moments(*reference.moments(rows, self.fan_in))


class WeightStandardization(Reparametrization):
    r"""Gives every filter mean 0 and variance 1; see :func:`normkit.weights.standardize`.

    .. math::  \hat W_o = g_o (W_o - \mu_o) / \sqrt{\sigma_o^2 + \epsilon} + b_o

    Args:
        weight: The raw weight, ``(O, I, *kernel)``. Its shape decides the shapes of gain and
            offset; its values are only used by ``preserve``.
        filters: Which values of the weight make one output channel.
        center: Subtract the mean.
        scale: Divide by the standard deviation.
        eps: Added to the variance, or as ``eps_to`` says.
        unbiased: Use the unbiased variance: divide the sum of squares by ``fan-in - 1``.
        eps_to: ``"variance"`` or ``"std"``.
        gain: Learn a factor of each filter, initialised to 1.
        preserve: Learn a factor and an offset of each filter, initialised so that the computed
            weight equals the raw one. The parameters are :math:`\sqrt I g_o` (``length``) and
            :math:`\sqrt I b_o` (``shift``), where :math:`I` is the fan-in: a step of SGD then
            changes the computed weight as it would change a plain weight, whereas the gradients of
            :math:`g_o` and :math:`b_o` are sums over a filter, which need a rate :math:`I` times
            smaller.

    Raises:
        WeightError: If a filter has a single value.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, eqs. 5 and 7.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> conv = nn.Conv2d(3, 8, 3)
        >>> before = conv.weight
        >>> rule = WeightStandardization(conv.weight)
        >>> _ = parametrize.register_parametrization(conv, "weight", rule)
        >>> conv.parametrizations.weight.original is before
        True
    """

    length: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(  # noqa: PLR0913 - the options of standardize
        self,
        weight: Tensor,
        filters: Filters | None = None,
        *,
        center: bool = True,
        scale: bool = True,
        eps: float = 1e-5,
        unbiased: bool = False,
        eps_to: EpsTo = "variance",
        gain: bool = False,
        preserve: bool = False,
    ) -> None:
        super().__init__(weight, filters or Filters())
        self.center = center
        self.scale = scale
        self.eps = eps
        self.unbiased = unbiased
        self.eps_to: EpsTo = eps_to
        self.register_parameter("length", None)
        self.register_parameter("shift", None)
        require_spread(self.algebra)
        if preserve:
            self._preserve(weight)
        elif gain:
            self.gain = nn.Parameter(weight.new_ones(self.filters.num_filters(weight)))

    @property
    def algebra(self) -> Standardize:
        """Subtraction of the mean and division by the standard deviation, as the options say."""
        return Standardize(
            fan_in=self.fan_in,
            center=self.center,
            scale=self.scale,
            eps=self.eps,
            unbiased=self.unbiased,
            eps_to=self.eps_to,
        )

    def _preserve(self, weight: Tensor) -> None:
        table, root = self._moments(weight), math.sqrt(self.fan_in)
        if self.scale:
            self.length = _per_filter(root / self.algebra.factor(table), weight)
        else:
            self.gain = nn.Parameter(weight.new_ones(self.filters.num_filters(weight)))
        mean = table.mean if self.center else torch.zeros_like(table.mean)
        self.shift = _per_filter(root * mean, weight)

    def gain_and_offset(self) -> tuple[Tensor | None, Tensor | None]:
        """Compute what each filter is multiplied by, and what is then added; None is 1 and 0."""
        root = math.sqrt(self.fan_in)
        gain = self.gain if self.length is None else self.length / root
        return gain, self.offset if self.shift is None else self.shift / root

    def rename_(self, state: dict[str, Any], prefix: str) -> None:
        """Turn gains and offsets of an earlier version into lengths and shifts."""
        for old, new in (("gain", "length"), ("offset", "shift")):
            if getattr(self, new) is not None and f"{prefix}{old}" in state:
                values = state.pop(f"{prefix}{old}")
                state.setdefault(f"{prefix}{new}", values * math.sqrt(self.fan_in))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **named: Any) -> None:
        self.rename_(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("length", "shift"):  # pickles of earlier versions have gains and offsets
            self._parameters.setdefault(name, None)


class WeightNorm(Reparametrization):
    r"""Learns a length of each filter, separately from its direction.

    .. math::  \hat W_o = g_o W_o / \sqrt{\lVert W_o \rVert^2 + \epsilon}

    Args:
        weight: The raw weight. ``gain`` is initialised to the lengths of its filters, so that the
            computed weight equals the raw one.
        filters: Which values of the weight make one output channel.
        eps: Added to the squared length.

    Source:
        Salimans & Kingma 2016, arXiv:1602.07868.

    Example:
        >>> round(WeightNorm(torch.tensor([[3.0, 4.0]])).gain.item(), 3)
        5.0
    """

    def __init__(
        self, weight: Tensor, filters: Filters | None = None, *, eps: float = LENGTH_EPS
    ) -> None:
        super().__init__(weight, filters or Filters())
        self.eps = eps
        lengths = 1 / self.algebra.factor(self._moments(weight))
        self.gain = _per_filter(lengths, weight)

    @property
    def algebra(self) -> UnitLength:
        """Division by the length."""
        return UnitLength(fan_in=self.fan_in, center=False, eps=self.eps)


class CenteredWeightNorm(Reparametrization):
    r"""Gives every filter mean 0 and a learned length.

    .. math::  \hat W_o = g_o (W_o - \mu_o) / \sqrt{\lVert W_o - \mu_o \rVert^2 + \epsilon}

    Args:
        weight: The raw weight; only its shape, dtype and device are used.
        filters: Which values of the weight make one output channel.
        gain: Initial length of every filter.
        eps: Added to the squared length.

    Raises:
        WeightError: If a filter has a single value.

    Source:
        Huang et al. 2017, Centered Weight Normalization in Accelerating Training of Deep Neural
        Networks.

    Example:
        >>> rule = CenteredWeightNorm(torch.randn(8, 4, 3, 3))
        >>> round(rule(torch.randn(8, 4, 3, 3))[0].norm().item(), 3)
        1.414
    """

    def __init__(
        self,
        weight: Tensor,
        filters: Filters | None = None,
        *,
        gain: float = 1.414,
        eps: float = LENGTH_EPS,
    ) -> None:
        super().__init__(weight, filters or Filters())
        self.eps = eps
        require_spread(self.algebra)
        lengths = weight.new_full((self.filters.num_filters(weight),), gain)
        self.gain = nn.Parameter(lengths)

    @property
    def algebra(self) -> UnitLength:
        """Subtraction of the mean and division by the length."""
        return UnitLength(fan_in=self.fan_in, center=True, eps=self.eps)


def _per_filter(values: Tensor, weight: Tensor) -> nn.Parameter:
    return nn.Parameter(values.flatten().to(weight.dtype))
