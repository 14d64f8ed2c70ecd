"""Lipschitz terms: the parts of a weight's gradient that weight standardization removes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.core.moments import Moments
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.diagnostics.stand_in import standardised
from normkit.errors import DataError
from normkit.passes import (
    Data,
    Forward,
    changes_nothing,
    forward_batch,
    require_batches,
    uncompiled,
    untouched,
    unwrap,
)
from normkit.weights.parametrizations import WeightStandardization

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, batch)`` returns a scalar tensor, which is differentiated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTerms:
    """The two terms of one layer, as shares of its squared gradient.

    Args:
        name: The layer's name.
        num_filters: Number of filters in its weight.
        weight_share: Share of the gradient along the standardised weight.
        mean_share: Share of the gradient along the constant filter.
    """

    name: str
    num_filters: int
    weight_share: float
    mean_share: float


@dataclass(frozen=True, kw_only=True)
class LipschitzTerms(Measurement):
    """Shares of the gradient that standardization removes, layer by layer.

    Args:
        layers: Layers with standardised weights, in the order of the model.
        num_batches: Number of batches that were measured.
    """

    layers: tuple[LayerTerms, ...]
    num_batches: int

    drawn = ("mean_share", "weight_share")

    @property
    def reading(self) -> str:
        """The mean shares of the two terms, in one sentence."""
        return read_finite_rows(self.layers, self._read)

    @staticmethod
    def _read(rows: Sequence[LayerTerms]) -> str:
        mean, weight = (
            sum(getattr(row, name) for row in rows) / len(rows)
            for name in ("mean_share", "weight_share")
        )
        return (
            f"Of the squared gradient of standardised weights, {100 * mean:.2g} % lie along the "
            f"constant and {100 * weight:.2g} % along the weight itself (means over layers); "
            f"standardization removes both."
        )


def cross_entropy_of_pairs(output: Any, batch: Any) -> Tensor:
    """Mean cross entropy of scores ``(N, K)``, for batches ``(inputs, target)``.

    Raises:
        DataError: If the batch is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            f"a batch of type {type(batch).__name__} has no target; give pairs (inputs, target), "
            f"or loss=lambda output, batch: ..."
        )
    return functional.cross_entropy(output, batch[1])


@changes_nothing
def lipschitz_terms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy_of_pairs,
    forward: Forward | None = None,
) -> LipschitzTerms:
    r"""Measure by how much weight standardization reduces the gradient of each weight.

    :math:`g` is the gradient of the standardised weight :math:`\hat W` of a filter of :math:`I`
    values. The squared gradient of the raw weight is then

    .. math::  \frac{1}{\sigma^2} \left( \lVert g \rVert^2 - \frac{1}{I} \langle 1, g \rangle^2
               - \frac{1}{I} \langle \hat W, g \rangle^2 \right)

    and the shares are the last two terms divided by the first, summed over filters and batches.
    :math:`\hat W` is computed with the layer's ``eps``. With ``unbiased`` its squared length is
    :math:`I - 1`, which then divides the last term. A layer without ``center`` keeps the term along
    the constant, so that share is 0; without ``scale`` the share along the weight is 0. The model
    runs in training mode, normalises by its batches, and is left as it was.

    Args:
        model: Has weights that ``standardize_weights_`` has standardised.
        batches: Pairs ``(inputs, target)``, or anything that ``loss`` and ``forward`` take.
        loss: ``loss(output, batch)``; by default the cross entropy.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.

    Returns:
        A row for each standardised layer.

    Raises:
        OptionError: If no weight is standardised.
        DataError: If there is no batch, a batch has no target, or no standardised weight gets a
            gradient.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, eqs. 17 and 20.

    Example:
        >>> import normkit as nk
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
        >>> _ = nk.standardize_weights_(model)
        >>> pair = torch.randn(4, 3, 3, 3), torch.tensor([0, 1, 2, 3])
        >>> [row.name for row in lipschitz_terms(model, [pair]).layers]
        ['0']
    """
    model = unwrap(model, "measure")
    rules = standardised(model)
    data = Data(batches=batches, forward=forward or forward_batch)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in rules}
    num_batches = 0
    with untouched(model, training=True), uncompiled(), torch.enable_grad():
        for batch in data.each(model, "measuring gradients"):
            for name, terms in _terms(rules, lambda b=batch: loss(data.forward(model, b), b)):
                sums[name] += terms
            num_batches += 1
    require_batches(num_batches)
    if not any(each.any() for each in sums.values()):
        raise DataError(
            "no standardised weight got a gradient: the batches are empty, or the loss does not "
            "depend on these layers"
        )
    rows = [_row(name, model.get_submodule(name), rules[name], sums[name]) for name in rules]
    return LipschitzTerms(layers=tuple(rows), num_batches=num_batches)


def _terms(
    rules: Mapping[str, WeightStandardization], compute: Callable[[], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Split each layer's squared gradient into the whole and the two terms that are removed."""
    # Raw and standardised weights by layer, as the first call of the parametrization had them.
    weights: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _rule: nn.Module, args: tuple[Tensor], weight: Tensor) -> None:
        weights.setdefault(name, (args[0], weight))

    with ExitStack() as hooks:
        for name, rule in rules.items():
            hooks.callback(rule.register_forward_hook(partial(keep, name)).remove)
        total = compute()
    standardised = [weight for _, weight in weights.values()]
    grads = torch.autograd.grad(total, standardised, allow_unused=True, materialize_grads=True)
    for (name, (raw, _)), grad in zip(weights.items(), grads, strict=True):
        yield name, _split(rules[name], raw.detach(), grad)


def _split(rule: WeightStandardization, raw: Tensor, grad: Tensor) -> Tensor:
    """Compute a layer's squared gradient and the terms along the constant and the weight, (3,)."""
    values, g = (rule.filters.rows(t)[0].double() for t in (raw, grad))
    gain, _ = rule.gain_and_offset()
    if gain is not None:
        # The formula needs the gradient of the weight before gain and offset.
        g = g * gain.detach().double()[:, None]
    size, centred = g.shape[1], values - values.mean(dim=1, keepdim=True)
    var = centred.square().mean(dim=1, keepdim=True)
    unit = centred * rule.algebra.factor(Moments(values.mean(dim=1, keepdim=True), var))
    squared_length = size - 1 if rule.unbiased else size
    along_constant = g.sum(dim=1).square() / size * rule.center
    along_weight = (unit * g).sum(dim=1).square() / squared_length * rule.scale
    terms = (g.square().sum(dim=1), along_constant, along_weight)
    return torch.stack([term.sum() for term in terms]).cpu()


def _row(name: str, layer: nn.Module, rule: WeightStandardization, sums: Tensor) -> LayerTerms:
    squares, mean, weight = sums.tolist()
    return LayerTerms(
        name=name,
        num_filters=rule.filters.num_filters(
            layer.get_parameter("parametrizations.weight.original")
        ),
        mean_share=mean / squares if squares else 0.0,
        weight_share=weight / squares if squares else 0.0,
    )
