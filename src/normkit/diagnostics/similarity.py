"""Propagation of similarity: whether convolutions make channels alike or different."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.moments import Moments
from normkit.diagnostics.channel_difference import stat_diff
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.errors import DataError, OptionError
from normkit.inference.population import Population
from normkit.inference.tracked import Unmeasured, Where, and_reasons, select_layers, unmeasured
from normkit.passes import (
    Data,
    Forward,
    changes_nothing,
    forward_batch,
    require_batches,
    untouched,
    unwrap,
)
from normkit.passes.inputs import first_argument
from normkit.weights.attach import standardizes_itself

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSimilarity:
    """How different the channels are before and after one convolution.

    Args:
        name: The convolution.
        fan_in: Values of a filter.
        input_difference: Spread of the input channels' means, in their standard deviations.
        output_difference: The same of its output channels.
        predicted_difference: The same as the paper's model of a convolution predicts it.
        input_spread: Spread of the input channels' standard deviations, in their mean.
        output_spread: The same of its output channels.
        predicted_spread: The same as the model predicts it.
    """

    name: str
    fan_in: int
    input_difference: float
    output_difference: float
    predicted_difference: float
    input_spread: float
    output_spread: float
    predicted_spread: float


@dataclass(frozen=True, kw_only=True)
class SimilarityPropagation(Measurement):
    """How different channels are before and after each convolution.

    Args:
        layers: Convolutions, in the order of the model.
        num_batches: Batches that were measured.
        left: Convolutions that were not measured, with the reason.
    """

    layers: tuple[LayerSimilarity, ...]
    num_batches: int
    left: tuple[Unmeasured, ...] = ()

    drawn = ("input_difference", "output_difference", "predicted_difference")

    @property
    def reading(self) -> str:
        """How different channels are before and after."""
        return read_finite_rows(self.layers, self._read)

    @staticmethod
    def _read(rows: Sequence[LayerSimilarity]) -> str:
        before, after, predicted = (
            sum(getattr(row, f"{name}_difference") for row in rows) / len(rows)
            for name in ("input", "output", "predicted")
        )
        return (
            f"Channels differ in their means by {before:.3g} of their standard deviations before "
            f"convolutions and by {after:.3g} after them; independent inputs would give "
            f"{predicted:.3g} (means over layers)."
        )


@changes_nothing
def similarity_propagation(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    where: Where | None = None,
    forward: Forward | None = None,
) -> SimilarityPropagation:
    r"""Measure whether convolutions pass on the similarity of their input channels.

    .. math::  \mu_o = b_o + \sum_i W_{oi} \mu_i, \quad
               \sigma_o^2 = \sum_i W_{oi}^2 \sigma_i^2

    is the paper's model of a convolution with weights :math:`W_{oi}` over the values of a filter,
    whose inputs are taken as independent. If the input channels are alike, filters of mean 0 and
    equal length make output channels that are alike, too: :math:`\mu_o \approx b_o` and
    :math:`\sigma_o` the same for all. Each row has the measured statistics of all channels
    together, before and after, and what the model predicts from those before. The network runs at
    evaluation and is left as it was.

    Args:
        model: Has convolutions; with ``standardize_weights_`` their filters have mean 0 and equal
            length.
        batches: Inputs, ``(inputs, target)`` or dicts of arguments.
        where: ``where(layer, name)`` says which convolutions are meant; by default all.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        A row for each convolution. ``..._difference`` is StatDiff over all channels, the standard
        deviation of their means over the mean of their standard deviations; ``..._spread`` is the
        standard deviation of their standard deviations over the same mean.

    Raises:
        OptionError: If the model has no convolution.
        DataError: If there is no batch, or none reaches a convolution.

    Numerics:
        Float64, over all batches together; variances are biased. The model knows no padding and no
        correlation between the values of a filter, which neighbours in an image have: the measured
        :math:`\sigma_o` of a smoothing filter is larger.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, eqs. 35 and 37 to 39.

    Example:
        >>> import normkit as nk
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> _ = nk.standardize_weights_(model)
        >>> alike = torch.randn(8, 3, 8, 8) + 1  # input channels of one mean
        >>> similarity_propagation(model, [alike]).layers[0].predicted_difference < 0.2
        True
    """
    model = unwrap(model, "measure")
    found = {n: m for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
    if not found:
        raise OptionError(f"{type(model).__name__} has no convolution, whose outputs could differ")
    layers = select_layers(found, where)
    left = {n: OWN_WEIGHT for n, m in layers.items() if standardizes_itself(m)}
    data = Data(batches=batches, forward=forward or forward_batch)
    seen = {name: (Population(), Population()) for name in layers if name not in left}
    with untouched(model, training=False), ExitStack() as hooks:
        for name, sides in seen.items():
            handle = layers[name].register_forward_hook(_seeing(*sides), with_kwargs=True)
            hooks.callback(handle.remove)
        num_batches = data.send(model, "measuring channels")
    require_batches(num_batches)
    reached = {name: sides for name, sides in seen.items() if sides[0].count}
    left |= {name: "no batch has reached it" for name in seen if name not in reached}
    if not reached:
        raise DataError(f"no batch has reached a convolution{and_reasons(left)}")
    return SimilarityPropagation(
        layers=tuple(
            _row(name, layers[name], *(side.moments for side in sides))
            for name, sides in reached.items()
        ),
        num_batches=num_batches,
        left=unmeasured(model, left),
    )


OWN_WEIGHT = "it standardises its weight in its own forward, so its filters are not known"


def _seeing(before: Population, after: Population) -> Callable[..., None]:
    """Take what goes into a convolution and what comes out of it into account."""

    def see(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        for side, x in ((before, first_argument(args, named)), (after, output)):
            alone = x.ndim < layer.weight.ndim  # type: ignore[operator, union-attr]
            side.add(x[None] if alone else x)  # an example without its batch axis

    return see


@torch.no_grad()
def predicted(layer: nn.Module, inputs: Moments) -> Moments:
    """Mean and variance of each output channel by eq. 37, from those of the input channels.

    Args:
        layer: A convolution.
        inputs: Of its input channels, ``(C,)``.
    """
    groups: int = layer.groups  # type: ignore[assignment]
    weight = layer.weight.detach().double().flatten(2)  # type: ignore[operator, union-attr]
    weight = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, kernel)
    mean, var = (each.to(weight).view(groups, 1, -1, 1) for each in (inputs.mean, inputs.var))
    center = (weight * mean).sum(dim=(2, 3)).flatten()
    bias = layer.bias
    if isinstance(bias, Tensor):
        center = center + bias.detach().double()
    return Moments(center, (weight.square() * var).sum(dim=(2, 3)).flatten())


def _row(name: str, layer: nn.Module, before: Moments, after: Moments) -> LayerSimilarity:
    model = predicted(layer, before)
    return LayerSimilarity(
        name=name,
        fan_in=layer.weight[0].numel(),  # type: ignore[index, union-attr]
        input_difference=stat_diff(before, 1).item(),
        output_difference=stat_diff(after, 1).item(),
        predicted_difference=stat_diff(model, 1).item(),
        input_spread=_spread(before),
        output_spread=_spread(after),
        predicted_spread=_spread(model),
    )


def _spread(moments: Moments) -> float:
    std = moments.var.sqrt()
    return (std.std(correction=0) / std.mean()).item()
