"""Projected gradients: the other way to keep weights standardised, step against step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.diagnostics.lipschitz import Loss, cross_entropy_of_pairs
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.diagnostics.stand_in import (
    Filters,
    measurable,
    not_reached,
    require_any,
    stand_ins,
)
from normkit.errors import OptionError
from normkit.inference.tracked import Unmeasured, Where, unmeasured
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
from normkit.weights.functional import reparametrize
from normkit.weights.parametrizations import WeightStandardization

Start = Callable[[WeightStandardization, Tensor], Filters]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUpdates:
    """How far one step turns the filters of one layer; means over filters and batches.

    Args:
        name: The layer.
        num_filters: Its filters.
        projected_degrees: Angle between a standardised filter before and after a projected step.
        tangent_degrees: The same after the paper's approximation of that step.
        standardized_degrees: The same after a step of the raw weight.
        tangent_error: Distance of the approximation from the projected step, in lengths of that
            step.
        rate_ratio: How many times as large the rate of a projected step would have to be to turn
            the filters as far as a step of the raw weight does: the ratio of the sums of the
            angles' tangents. 1 if nothing turns.
    """

    name: str
    num_filters: int
    projected_degrees: float
    tangent_degrees: float
    standardized_degrees: float
    tangent_error: float
    rate_ratio: float


@dataclass(frozen=True, kw_only=True)
class ProjectedUpdates(Measurement):
    """Steps of projected gradient descent and of weight standardization, layer by layer.

    Args:
        layers: Layers with standardised weights, in the order of the model.
        rate: Learning rate of the steps.
        num_batches: Batches that were measured.
        left: Standardised layers that were not measured, with the reason.
    """

    layers: tuple[LayerUpdates, ...]
    rate: float
    num_batches: int
    left: tuple[Unmeasured, ...] = ()

    drawn = ("projected_degrees", "tangent_degrees", "standardized_degrees")

    @property
    def reading(self) -> str:
        """How far each rule turns the filters."""
        return read_finite_rows(self.layers, self._read)

    def _read(self, rows: Sequence[LayerUpdates]) -> str:
        projected, raw = (
            sum(getattr(row, name) for row in rows) / len(rows)
            for name in ("projected_degrees", "standardized_degrees")
        )
        ratio = math.exp(sum(math.log(max(row.rate_ratio, 1e-300)) for row in rows) / len(rows))
        return (
            f"At a rate of {self.rate:g} a projected step turns a standardised filter by "
            f"{projected:.3g} degrees and a step of the raw weight by {raw:.3g} (means over "
            f"layers): the raw weight steps as if its rate were {ratio:.3g} times as large."
        )


@changes_nothing
def projected_updates(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rate: float = 0.1,
    where: Where | None = None,
    loss: Loss = cross_entropy_of_pairs,
    forward: Forward | None = None,
) -> ProjectedUpdates:
    r"""Compare a step of weight standardization with one of projected gradient descent.

    With the gradient :math:`g` by the standardised filter :math:`\hat W` of :math:`I` values, and
    :math:`\mathrm{Proj}` to standardise, the three steps of rate :math:`\epsilon` are

    .. math::  \hat W_{proj} = \mathrm{Proj}(\hat W - \epsilon g)

    .. math::  \hat W_{tan} = \hat W - \epsilon \left( g - \frac{1}{I} \langle 1, g \rangle 1
               - \frac{1}{I} \langle \hat W, g \rangle \hat W \right)

    .. math::  \hat W_{std} = \mathrm{Proj}(W - \epsilon \nabla_W L)

    All three move a filter in the same direction, the bracket of the second. They differ in the
    rate: a step of the raw weight of deviation :math:`\sigma` is worth :math:`\epsilon / \sigma^2`,
    a projected step :math:`\epsilon / (1 - \epsilon \langle \hat W, g \rangle / I)`. The model is
    in training mode and is left as it was; no step is taken.

    Args:
        model: Has weights that ``standardize_weights_`` has standardised.
        batches: ``(inputs, target)``, or what ``loss`` and ``forward`` take.
        rate: Learning rate of all three steps.
        where: ``where(layer, name)`` says which layers are meant; by default all.
        loss: ``loss(output, batch)``; by default the cross entropy.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        A row for each standardised layer.

    Raises:
        OptionError: If no weight is standardised by both mean and deviation, or ``rate`` is not a
            finite number above 0.
        DataError: If there is no batch, one without a target, or none reaches a layer.

    Numerics:
        Steps are computed in float64. The layers' ``eps`` is taken as 0, as in the paper's section
        5: otherwise a standardised filter would not stay as it is when it is standardised again.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, eqs. 25 to 28. Eq. 27 is printed with a factor 1 before the last inner
        product and no rate before the mean; only with :math:`1/I` and the rate, as above, does it
        approximate eq. 26.

    Example:
        >>> import normkit as nk
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
        >>> _ = nk.standardize_weights_(model)
        >>> pair = torch.randn(4, 3, 3, 3), torch.tensor([0, 1, 2, 3])
        >>> row = projected_updates(model, [pair]).layers[0]
        >>> row.standardized_degrees > row.projected_degrees  # these weights deviate by 0.1
        True
    """
    if not 0 < rate < math.inf:
        raise OptionError(f"rate={rate} was given; it is a finite number above 0")
    model = unwrap(model, "measure")
    rules, left = measurable(model, where, _why_not)
    data = Data(batches=batches, forward=forward or forward_batch)
    sums: dict[str, list[Tensor]] = {name: [] for name in rules}
    num_batches = 0
    with untouched(model, training=True), uncompiled(), torch.enable_grad():
        for batch in data.each(model, "measuring steps"):
            raws: dict[WeightStandardization, Tensor] = {}
            with stand_ins(rules, _keeping(raws), _as_it_is) as leaves:
                total = loss(data.forward(model, batch), batch)
            for name, grad in _gradients(total, leaves).items():
                sums[name].append(_measured(rules[name], raws[rules[name]], grad, rate))
            num_batches += 1
    require_batches(num_batches)
    reached = require_any({name: found for name, found in sums.items() if found})
    return ProjectedUpdates(
        layers=tuple(_row(name, torch.stack(found)) for name, found in reached.items()),
        rate=rate,
        num_batches=num_batches,
        left=unmeasured(model, left | not_reached(sums.keys() - reached.keys())),
    )


def _why_not(rule: WeightStandardization) -> str:
    if rule.center and rule.scale:
        return ""
    return f"it does not {'divide by the deviation' if rule.center else 'centre its weight'}"


def _keeping(raws: dict[WeightStandardization, Tensor]) -> Start:
    """Start from the standardised filters, and keep the raw weight."""

    def start(rule: WeightStandardization, raw: Tensor) -> Filters:
        raws[rule] = raw
        return rule.filters.rows(_project(rule, raw))

    return start


def _project(rule: WeightStandardization, weight: Tensor) -> Tensor:
    """Standardise as the layer does, before gain and offset, but with ``eps`` 0."""
    return reparametrize(weight, rule.filters, replace(rule.algebra, eps=0.0), None, None)


def _as_it_is(_rule: WeightStandardization, filters: Filters) -> Filters:
    return filters * 1


def _gradients(total: Tensor, leaves: Mapping[str, Filters]) -> dict[str, Filters]:
    if not leaves:
        return {}
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


class Steps(NamedTuple):
    """A layer's filters before and after one step by each rule, ``(O, I)`` each."""

    before: Tensor
    projected: Tensor
    tangent: Tensor
    standardized: Tensor


def steps_of(rule: WeightStandardization, raw: Tensor, grad: Filters, rate: float) -> Steps:
    """Take a step by each of the three rules.

    Args:
        rule: What standardises the layer.
        raw: Its raw weight.
        grad: Gradient by the standardised filters, ``(1, O, I)``.
        rate: Learning rate.
    """
    raw, grad = raw.double().requires_grad_(), grad.double()
    with torch.enable_grad():
        made = rule.filters.rows(_project(rule, raw))
        (of_raw,) = torch.autograd.grad(made, raw, grad)
    before = made.detach()
    length = before.square().sum(dim=-1, keepdim=True)
    along = (before * grad).sum(dim=-1, keepdim=True) / torch.where(length > 0, length, 1)
    tangent = grad - grad.mean(dim=-1, keepdim=True) - along * before
    stepped = rule.filters.weight((before - rate * grad).contiguous(), raw)
    after = (
        rule.filters.rows(_project(rule, stepped)),
        before - rate * tangent,
        rule.filters.rows(_project(rule, raw.detach() - rate * of_raw)),
    )
    return Steps(before[0], *(each[0].detach() for each in after))


def _measured(rule: WeightStandardization, raw: Tensor, grad: Filters, rate: float) -> Tensor:
    """Three angles in radians and the error of the approximation, for each filter: ``(4, O)``."""
    steps = steps_of(rule, raw, grad, rate)
    angles = [_angle(steps.before, after) for after in steps[1:]]
    moved = (steps.projected - steps.before).norm(dim=1)
    error = (steps.tangent - steps.projected).norm(dim=1) / torch.where(moved > 0, moved, 1)
    return torch.stack([*angles, error]).cpu()


def _angle(before: Tensor, after: Tensor) -> Tensor:
    """Angle between rows, accurate also where it is tiny; 0 where a row has no length."""
    a, b = (torch.nn.functional.normalize(each, dim=1) for each in (before, after))
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def _row(name: str, found: Tensor) -> LayerUpdates:
    """Means over batches and filters of ``(batches, 4, O)``."""
    tangents = found[:, :3].tan().abs().sum(dim=(0, 2))
    means = found.mean(dim=(0, 2))
    projected, tangent, standardized = means[:3].rad2deg().tolist()
    return LayerUpdates(
        name=name,
        num_filters=found.shape[2],
        projected_degrees=projected,
        tangent_degrees=tangent,
        standardized_degrees=standardized,
        tangent_error=means[3].item(),
        rate_ratio=(tangents[2] / tangents[0]).item() if tangents[0] else 1.0,
    )
