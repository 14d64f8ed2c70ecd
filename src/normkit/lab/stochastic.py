"""Group norm with the randomness of batch norm: three ways that Summers & Dinneen tried.

Their appendix B names the ways and no settings; what is ours is said at each class.
``normkit compare --own-norms NAME=normkit/lab/stochastic.py:CLASS`` trains with one of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from normkit.core.check import require_choice, require_count, require_share
from normkit.core.ending import Ending, ended
from normkit.core.mask import Valid
from normkit.core.partition import Partition
from normkit.errors import OptionError
from normkit.layers.options import TrackingOptions
from normkit.layers.over_example import GroupNorm
from normkit.typing import FeatureMap

SMALLEST = 0.01  # of a variance, that is left of it at least
Direction = Literal["growing", "shrinking"]


class _RandomInTraining(GroupNorm):
    """Group norm at evaluation and for masked inputs; subclasses say what training does."""

    def _normalize(
        self, x: FeatureMap, valid: Valid | None, ending: Ending | None = None
    ) -> FeatureMap:
        if not self.training or valid is not None or x.numel() == 0:
            return super()._normalize(x, valid, ending)
        return ended(self._train(x), ending)

    @abstractmethod
    def _train(self, x: FeatureMap) -> FeatureMap:
        """Normalise an input that is not empty, in training."""

    def _of_group_norm(self, x: FeatureMap) -> FeatureMap:
        return super()._normalize(x, None)


class NoisyGroupNorm(_RandomInTraining):
    r"""Group norm whose statistics are disturbed in training.

    .. math::  y = \gamma_c (x - \tilde\mu_{ng}) / \sqrt{\tilde\sigma_{ng}^2 + \epsilon} + \beta_c,
               \quad \tilde\mu_{ng} = \mu_{ng} + a \bar\sigma_g z, \quad
               \tilde\sigma_{ng}^2 = \sigma_{ng}^2 + a \bar\sigma_g^2 z'

    :math:`z, z'` are standard normal draws, one for each group of each example, and
    :math:`\bar\sigma_g^2` a moving average of the group's variances. The paper bases the noise on a
    moving average and does not say how; this is ours. A variance keeps 1 percent of itself.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Runs of channels; divides ``C``.
        noise: :math:`a`, 0 or more.
        rate: Weight of the new value in the moving average.
        **shared: As in ``GroupNorm``.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization,
        appendix B.

    Example:
        >>> import torch
        >>> norm = NoisyGroupNorm(6, num_groups=3, noise=0.5)
        >>> norm(torch.randn(2, 6, 5)).shape
        torch.Size([2, 6, 5])
    """

    average_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        noise: float = 0.1,
        rate: float = 0.1,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        super().__init__(num_features, num_groups=num_groups, **shared)
        if not noise >= 0:
            raise OptionError(f"noise={noise!r} was given; it is 0 or more, and 0 disturbs nothing")
        require_share("rate", rate)
        self.noise, self.rate = noise, rate
        average = torch.ones(num_groups, device=shared.get("device"))
        self.register_buffer("average_var", average)

    def _train(self, x: FeatureMap) -> FeatureMap:
        wide = x.unflatten(1, (self.num_groups, -1)).flatten(2)
        wide = wide if x.dtype == torch.float64 else wide.float()
        var, mean = torch.var_mean(wide, 2, correction=0, keepdim=True)
        with torch.no_grad():
            self.average_var.lerp_(var.mean((0, 2)).to(self.average_var.dtype), self.rate)
            average = self.average_var[:, None]
            away = self.noise * average.sqrt() * torch.randn_like(mean)
            more = self.noise * average * torch.randn_like(var)
            more = torch.maximum(more, (SMALLEST - 1) * var)
        y = (wide - mean - away) / (var + more + self.eps).sqrt()
        y = y.view(x.shape).to(x.dtype)
        shape = (-1, *[1] * (x.ndim - 2))
        y = y if self.weight is None else y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


class ShuffledGroupNorm(_RandomInTraining):
    """Group norm over random groups of channels in training.

    Evaluation takes runs of channels, as group norm does.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: Groups; divides ``C``.
        share: Share of the training steps that draw groups; the others take runs of channels.
        **shared: As in ``GroupNorm``.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization,
        appendix B.

    Example:
        >>> import torch
        >>> norm = ShuffledGroupNorm(6, num_groups=3)
        >>> norm(torch.randn(2, 6, 5)).shape
        torch.Size([2, 6, 5])
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        share: float = 1.0,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        super().__init__(num_features, num_groups=num_groups, **shared)
        require_share("share", share)
        self.share = share

    def _train(self, x: FeatureMap) -> FeatureMap:
        if torch.rand((), device="cpu") >= self.share:
            return self._of_group_norm(x)
        order = torch.randperm(self.num_features, device=x.device)
        weight = None if self.weight is None else self.weight[order]
        bias = None if self.bias is None else self.bias[order]
        y = torch.nn.functional.group_norm(x[:, order], self.num_groups, weight, bias, self.eps)
        return y[:, order.argsort()]


class ScheduledGroupNorm(_RandomInTraining):
    r"""Group norm whose number of groups changes in training, by powers of two.

    After :math:`t` of ``length`` steps a growing number is the largest power of two up to
    :math:`G^{t / length}`, so that it goes from 1 to :math:`G`; a shrinking one goes from
    :math:`G` to 1. Both stay after ``length`` steps, and evaluation takes the present number. The
    paper says only that the number rises or falls with the steps.

    Args:
        num_features: Channels ``C`` of the input ``(N, C, *S)``.
        num_groups: The largest number of groups :math:`G`: a power of two that divides ``C``.
        direction: ``"growing"`` or ``"shrinking"``.
        length: Steps until the number stays.
        **shared: As in ``GroupNorm``.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization,
        appendix B.

    Example:
        >>> norm = ScheduledGroupNorm(16, num_groups=8, length=30)
        >>> norm.present_groups
        1
    """

    num_steps: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        direction: Direction = "growing",
        length: int = 1000,
        **shared: Unpack[TrackingOptions],
    ) -> None:
        super().__init__(num_features, num_groups=num_groups, **shared)
        require_choice("direction", direction, get_args(Direction))
        if num_groups & (num_groups - 1):
            raise OptionError(
                f"num_groups={num_groups} was given; it is a power of two, because the number of "
                f"groups doubles or halves"
            )
        self.direction, self.length = direction, require_count("length", length)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    @property
    def present_groups(self) -> int:
        """The number of groups of the next call."""
        doublings = self.num_groups.bit_length() - 1
        num_steps = 0 if self.num_steps.is_meta else int(self.num_steps)
        done = min(num_steps, self.length) * doublings // self.length
        return 2 ** (done if self.direction == "growing" else doublings - done)

    @property
    def partition(self) -> Partition:
        """One group per run of channels and example."""
        return Partition(num_groups=self.present_groups, examples_per_group=1)

    def _train(self, x: FeatureMap) -> FeatureMap:
        y = self._of_group_norm(x)
        self.num_steps += 1
        return y
