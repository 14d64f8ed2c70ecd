"""Hessian norms: by how much centring a weight makes the gradient more predictable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.check import require_count
from normkit.core.moments import Moments
from normkit.diagnostics.lipschitz import Loss, cross_entropy_of_pairs
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.diagnostics.stand_in import Filters, measurable, not_reached, require_any, stand_ins
from normkit.inference.tracked import Unmeasured, Where, unmeasured
from normkit.kernels.reference import table_dtype
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

Product = Callable[[Tensor], Tensor]
"""A Hessian's product with a vector, ``(I,)`` to ``(I,)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHessian:
    """Hessians of some filters of one layer.

    Args:
        name: The layer.
        num_filters: Filters that were measured.
        fan_in: Values of a filter.
        centred_squares: Sum of the squares of the Hessian by the centred weight.
        raw_squares: The same by the raw weight.
        reduction: Share of the former that centring takes out.
        least_reduction: Share that the paper guarantees.
    """

    name: str
    num_filters: int
    fan_in: int
    centred_squares: float
    raw_squares: float
    reduction: float
    least_reduction: float


@dataclass(frozen=True, kw_only=True)
class HessianNorms(Measurement):
    """Squared Frobenius norms of Hessians before and after centring, layer by layer.

    Args:
        layers: Layers with standardised weights, in the order of the model.
        num_batches: Batches that were measured.
        num_probes: Random vectors of the estimate; None if all columns were computed.
        left: Standardised layers that were not measured, with the reason.
    """

    layers: tuple[LayerHessian, ...]
    num_batches: int
    num_probes: int | None
    left: tuple[Unmeasured, ...] = ()

    drawn = ("reduction", "least_reduction")

    @property
    def reading(self) -> str:
        """How much of the Hessian centring takes out."""
        return read_finite_rows(self.layers, self._read)

    def _read(self, rows: Sequence[LayerHessian]) -> str:
        mean, least = (
            sum(getattr(row, name) for row in rows) / len(rows)
            for name in ("reduction", "least_reduction")
        )
        how = "exact" if self.num_probes is None else f"estimated by {self.num_probes} vectors"
        return (
            f"Centring takes {100 * mean:.2g} % out of the squared Hessian of a filter, of which "
            f"{100 * least:.2g} % are guaranteed (means over layers; {how})."
        )


@changes_nothing
def hessian_norms(  # noqa: PLR0913 - what is measured, and how closely
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_filters: int = 4,
    num_probes: int | None = 8,
    where: Where | None = None,
    loss: Loss = cross_entropy_of_pairs,
    forward: Forward | None = None,
) -> HessianNorms:
    r"""Measure by how much centring reduces the Hessian of a standardised filter.

    Of a filter of :math:`I` values, :math:`\dot H` is the Hessian of the loss by the centred weight
    :math:`\dot W = W - \mu`, and :math:`H` the one by the raw weight :math:`W`:

    .. math::  H_{ij} = \dot H_{ij} - \frac{1}{I} \sum_k (\dot H_{ik} + \dot H_{kj})
                        + \frac{1}{I^2} \sum_{pq} \dot H_{pq}

    .. math::  \lVert \dot H \rVert^2 - \lVert H \rVert^2
               = \frac{2}{I} \lVert \dot H 1 \rVert^2 - \frac{1}{I^2} \langle 1, \dot H 1 \rangle^2
               \geq \frac{1}{I^2} \langle 1, \dot H 1 \rangle^2

    with Frobenius norms. The right hand side is the guaranteed reduction. All rows and columns of
    :math:`H` sum to 0. The model is in training mode and is left as it was.

    Args:
        model: Has weights that ``standardize_weights_`` has standardised.
        batches: ``(inputs, target)``, or what ``loss`` and ``forward`` take. Squares are summed
            over batches.
        num_filters: Filters of each layer to measure, evenly spaced among its filters.
        num_probes: Random vectors :math:`v` of the estimate :math:`\lVert H \rVert^2 \approx
            \mathrm{mean}\, \lVert H v \rVert^2`, with values of -1 and 1. Each costs a backward
            pass through a backward pass, for each filter. None computes all :math:`I` columns.
        where: ``where(layer, name)`` says which layers are meant; by default all.
        loss: ``loss(output, batch)``; by default the cross entropy.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        A row for each standardised layer. What centring takes out is exact; only
        ``raw_squares``, and ``centred_squares`` by it, are estimated.

    Raises:
        OptionError: If no weight is standardised with centring, or a count is below 1.
        DataError: If there is no batch, one without a target, or none reaches a layer.

    Numerics:
        The standardised weight is computed from :math:`\dot W` as in the paper's eq. 12, with the
        layer's own ``eps``: by the mean of its squares. Products are summed in float64. The probes
        are drawn from a generator of their own: equal calls give equal estimates.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, eqs. 21 to 24; the paper writes the squared norm without its square.

    Example:
        >>> import normkit as nk
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
        >>> _ = nk.standardize_weights_(model)
        >>> pair = torch.randn(4, 3, 3, 3), torch.tensor([0, 1, 2, 3])
        >>> found = hessian_norms(model, [pair]).layers[0]
        >>> found.raw_squares < found.centred_squares, found.least_reduction <= found.reduction
        (True, True)
    """
    require_count("num_filters", num_filters)
    if num_probes is not None:
        require_count("num_probes", num_probes)
    model = unwrap(model, "measure")
    rules, left = measurable(model, where, _why_not)
    data = Data(batches=batches, forward=forward or forward_batch)
    tables: dict[str, Table] = {name: Table(num_filters, num_probes) for name in rules}
    num_batches = 0
    with untouched(model, training=True), uncompiled(), torch.enable_grad():
        for batch in data.each(model, "measuring Hessians"):
            with stand_ins(rules, _centred, _standardised_from) as leaves:
                total = loss(data.forward(model, batch), batch)
            for name, leaf, grad in _gradients(total, leaves):
                tables[name].add(leaf, grad)
            num_batches += 1
    require_batches(num_batches)
    reached = {name: table for name, table in tables.items() if table.fan_in}
    left |= not_reached(tables.keys() - reached.keys())
    return HessianNorms(
        layers=tuple(table.row(name) for name, table in require_any(reached).items()),
        num_batches=num_batches,
        num_probes=num_probes,
        left=unmeasured(model, left),
    )


def _why_not(rule: WeightStandardization) -> str:
    return "" if rule.center else "it does not centre its weight"


def _centred(rule: WeightStandardization, raw: Tensor) -> Filters:
    rows = rule.filters.rows(raw)
    rows = rows.to(table_dtype(rows.dtype))
    return rows - rows.mean(dim=-1, keepdim=True)


def _standardised_from(rule: WeightStandardization, centred: Filters) -> Filters:
    """Eq. 12: divide the centred weight by the root of its mean square."""
    if not rule.scale:
        return centred * 1
    squares = centred.square().mean(dim=-1)
    factor = rule.algebra.factor(Moments(torch.zeros_like(squares), squares))
    return centred * factor[..., None]


def _gradients(
    total: Tensor, leaves: Mapping[str, Filters]
) -> Iterator[tuple[str, Filters, Filters]]:
    """The gradient by each leaf, which can be differentiated again."""
    if not leaves:
        return
    grads = torch.autograd.grad(
        total, list(leaves.values()), create_graph=True, materialize_grads=True
    )
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        yield name, leaf, grad


class Table:
    """Sums of squares of one layer's Hessians.

    Args:
        num_filters: Filters to measure, at most.
        num_probes: Random vectors; None takes all columns.
    """

    def __init__(self, num_filters: int, num_probes: int | None) -> None:
        self._num_filters, self._num_probes = num_filters, num_probes
        self.num_filters = self.fan_in = 0
        self.raw = self.taken = self.least = 0.0

    def add(self, leaf: Filters, grad: Filters) -> None:
        """Take the Hessians of one batch into account.

        Args:
            leaf: Centred weight, ``(1, O, I)``.
            grad: Gradient by it.
        """
        self.fan_in = leaf.shape[-1]
        filters = evenly(leaf.shape[1], self._num_filters)
        self.num_filters = len(filters)
        for index in filters:
            self._add_filter(product_of(leaf, grad, index))

    def _add_filter(self, product: Product) -> None:
        ones = torch.ones(self.fan_in, dtype=torch.float64)
        sums = product(ones)
        guaranteed = (sums.sum() / self.fan_in).square().item()
        self.least += guaranteed
        self.taken += 2 / self.fan_in * sums.square().sum().item() - guaranteed
        squares = [_centre(product(_centre(v))).square().sum().item() for v in self._vectors()]
        self.raw += sum(squares) / (1 if self._num_probes is None else len(squares))

    def _vectors(self) -> Iterable[Tensor]:
        if self._num_probes is None:
            return torch.eye(self.fan_in, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.fan_in)
        drawn = torch.randint(2, (self._num_probes, self.fan_in), generator=generator)
        return drawn.double() * 2 - 1

    def row(self, name: str) -> LayerHessian:
        """Squares and shares."""
        centred = self.raw + self.taken
        return LayerHessian(
            name=name,
            num_filters=self.num_filters,
            fan_in=self.fan_in,
            centred_squares=centred,
            raw_squares=self.raw,
            reduction=self.taken / centred if centred else 0.0,
            least_reduction=self.least / centred if centred else 0.0,
        )


def product_of(leaf: Filters, grad: Filters, index: int) -> Product:
    """The product of one filter's Hessian with a vector."""

    def product(vector: Tensor) -> Tensor:
        if not grad.requires_grad:  # the loss is linear in the weight
            return torch.zeros_like(vector)
        along = grad[0, index] @ vector.to(grad)
        (found,) = torch.autograd.grad(
            along, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return found[0, index].double().cpu()

    return product


def evenly(total: int, at_most: int) -> list[int]:
    """Places of so many things, evenly spaced among all.

    Example:
        >>> evenly(10, 4), evenly(2, 4)
        ([0, 3, 6, 9], [0, 1])
    """
    return torch.linspace(0, total - 1, min(total, at_most)).round().long().tolist()


def _centre(vector: Tensor) -> Tensor:
    return vector - vector.mean()
