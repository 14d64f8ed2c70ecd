"""Singularity ratio: how near channels are to having no weight that takes them as input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.errors import OptionError
from normkit.inference.tracked import Where, select_layers
from normkit.passes import changes_nothing, unwrap
from normkit.tracing import CONVOLUTIONS
from normkit.weights.filters import TRANSPOSED


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputWeights:
    """Weights that take each input channel of one layer.

    Args:
        name: The layer.
        num_channels: Channels of its input.
        smallest: Sum of the absolute weights of the channel that has the least.
        mean: Mean of these sums over the channels.
        ratio: ``smallest / mean``, from 0 (a channel without weights) to 1 (all alike).
    """

    name: str
    num_channels: int
    smallest: float
    mean: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class SingularityRatio(Measurement):
    """How evenly layers weigh the channels of their inputs.

    Args:
        layers: Convolutions and linear layers, in the order of the model.
        ratio: Mean of the ratio over those that have a finite one.
    """

    layers: tuple[LayerInputWeights, ...]
    ratio: float

    drawn = ("ratio",)

    @property
    def reading(self) -> str:
        """The ratio, and where it is smallest."""
        return read_finite_rows(self.layers, self._read)

    def _read(self, rows: Sequence[LayerInputWeights]) -> str:
        least = min(rows, key=lambda row: row.ratio)
        return (
            f"The weights that take the weakest input channel are {self.ratio:.3g} of the mean "
            f"channel's (mean over layers), least in {least.name or 'the model itself'} "
            f"({least.ratio:.3g}); 0 is a channel without weights."
        )


@changes_nothing
def singularity_ratio(model: nn.Module, *, where: Where | None = None) -> SingularityRatio:
    r"""Measure how near a network's weights are to eliminating a channel.

    .. math::  \frac{1}{L} \sum_l \frac{\min_{c \in l} \lVert \omega_c \rVert_1}
                                       {\mathrm{mean}_{c \in l} \lVert \omega_c \rVert_1}

    where :math:`\omega_c` are the weights of layer :math:`l` that take channel :math:`c` as input.
    At 0 some channel is eliminated. Needs no data; the model is left as it was.

    Args:
        model: Has convolutions, transposed convolutions or linear layers. Weights are those that
            the forward uses, standardised ones too.
        where: ``where(layer, name)`` says which layers are meant; by default all.

    Returns:
        A row for each layer, and the mean of their ratios. A layer whose weights are all 0 has the
        ratio 0.

    Raises:
        OptionError: If there is no such layer.

    Numerics:
        Float64.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, section 3.2, which finds 0.55 for a ResNet-50 trained on ImageNet and
        concludes that weights do not show what is eliminated; ``inactive_channels`` does.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]]))
        >>> singularity_ratio(nn.Sequential(layer, nn.Linear(2, 1))).layers[0].ratio
        1.0
        >>> _ = layer.weight.data[:, 2].zero_()
        >>> singularity_ratio(layer).ratio
        0.0
    """
    model = unwrap(model, "measure")
    found = {n: m for n, m in model.named_modules() if isinstance(m, WEIGHTED)}
    if not found:
        raise OptionError(
            f"{type(model).__name__} has no convolution and no linear layer, so no weight takes a "
            f"channel"
        )
    rows = tuple(_row(name, layer) for name, layer in select_layers(found, where).items())
    finite = [row.ratio for row in rows if row.ratio == row.ratio]
    mean = sum(finite) / len(finite) if finite else float("nan")
    return SingularityRatio(layers=rows, ratio=mean)


WEIGHTED = (*CONVOLUTIONS, nn.Linear)


@torch.no_grad()
def input_weights(layer: nn.Module) -> Tensor:
    """Sum of the absolute weights that take each input channel, ``(C,)`` in float64."""
    weight = layer.weight.detach().double().abs()  # type: ignore[operator, union-attr]
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, *kernel)
        return weight.flatten(1).sum(dim=1)
    groups = getattr(layer, "groups", 1)
    by_group = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, *kernel)
    return by_group.flatten(3).sum(dim=(1, 3)).flatten() if weight.ndim > 2 else weight.sum(dim=0)


def _row(name: str, layer: nn.Module) -> LayerInputWeights:
    sums = input_weights(layer)
    smallest, mean = sums.min().item(), sums.mean().item()
    return LayerInputWeights(
        name=name,
        num_channels=sums.numel(),
        smallest=smallest,
        mean=mean,
        ratio=0.0 if mean == 0 else smallest / mean,
    )
