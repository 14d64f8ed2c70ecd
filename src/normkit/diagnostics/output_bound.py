"""Output bound: how far a norm's results reach in training, where they cannot reach further."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.core.partition import Partition
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.errors import DataError, OptionError
from normkit.inference.norm_inputs import Missed, watch_inputs
from normkit.inference.tracked import Unmeasured, Where, and_reasons, select_layers, unmeasured
from normkit.layers.base import NormLayer, is_estimated
from normkit.layers.over_example import PositionalNorm
from normkit.layers.parts import Part
from normkit.passes import (
    Data,
    Forward,
    as_list,
    changes_nothing,
    forward_batch,
    untouched,
    unwrap,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBound:
    """How far the results of one norm reach, before scale and shift.

    Args:
        name: The norm.
        num_values: Values in its smallest statistics group in training.
        bound: Largest absolute result that such a group can give: ``sqrt(num_values - 1)``.
        largest_training: Largest absolute result in training.
        largest_evaluation: The same at evaluation.
        share: Largest absolute result in training, as a share of the bound of its own group.
    """

    name: str
    num_values: int
    bound: float
    largest_training: float
    largest_evaluation: float
    share: float


@dataclass(frozen=True, kw_only=True)
class OutputBound(Measurement):
    """How far norms reach in training and at evaluation, and how far they can in training.

    Args:
        layers: Norms, in the order of the model.
        num_batches: Batches that were measured.
        left: Norms that were not measured, with the reason.
    """

    layers: tuple[LayerBound, ...]
    num_batches: int
    left: tuple[Unmeasured, ...] = ()

    drawn = ("bound", "largest_training", "largest_evaluation")

    @property
    def reading(self) -> str:
        """Which norms reach beyond the bound at evaluation."""
        return read_finite_rows(self.layers, self._read)

    @staticmethod
    def _read(rows: Sequence[LayerBound]) -> str:
        beyond = [row for row in rows if row.largest_evaluation > row.bound * (1 + 1e-6)]
        nearest = max(rows, key=lambda row: row.share)
        said = (
            f"In training no result can exceed sqrt(n - 1) of a group of n values; nearest comes "
            f"{nearest.name or 'the model itself'} with {nearest.share:.3g} of that. "
        )
        if not beyond:
            return f"{said}At evaluation none of the {len(rows)} norms exceeds it."
        worst = max(beyond, key=lambda row: row.largest_evaluation / row.bound)
        return (
            f"{said}At evaluation {len(beyond)} of {len(rows)} norms do, most "
            f"{worst.name or 'the model itself'} ({worst.largest_evaluation:.3g}, where the bound "
            f"is {worst.bound:.3g})."
        )

    def plot(self) -> Any:
        """Draw bound and results over the norms, on a logarithmic axis.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        figure = super().plot()
        axes = figure.axes[0]
        axes.set_ylim(bottom=min([0.5, *(r.largest_training / 2 or 0.5 for r in self.layers)]))
        axes.set_yscale("log")
        return figure


@changes_nothing
def output_bound(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    where: Where | None = None,
    forward: Forward | None = None,
) -> OutputBound:
    r"""Compare how far norms reach at evaluation with how far they can reach in training.

    In training every value is among the :math:`n` values that its mean and variance are of, so

    .. math::  \left| \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \right| \leq \sqrt{n - 1}

    whatever the input. With running statistics there is no such bound. Results are before the
    norm's scale and shift. Batches go through the model in training mode and at evaluation; it is
    left as it was.

    Args:
        model: Has norms of torch or normkit. Composites are measured by the norms inside of them.
        batches: Inputs, ``(inputs, target)`` or dicts of arguments, of the size that they have in
            training: the bound depends on it. Read once and kept.
        where: ``where(layer, name)`` says which norms are meant; by default all.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        A row for each norm.

    Raises:
        OptionError: If the model has no norm with statistics groups.
        DataError: If there is no batch, or none reaches a norm.
        PartitionError: If a group has a single value in training.

    Numerics:
        Results in training are computed from each norm's input by the definition, in float64. Those
        at evaluation are the norm's own function of its input in float64.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, eq. 2
        and appendix A: there for batch norm without positions, :math:`n` is the batch size.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        >>> row = output_bound(model, [torch.randn(5, 4)]).layers[0]
        >>> row.num_values, row.bound, row.largest_training <= row.bound
        (5, 2.0, True)
    """
    model = unwrap(model, "measure")
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    if not norms:
        raise OptionError(f"{type(model).__name__} has no norm of torch or normkit with groups")
    layers = select_layers(norms, where)
    left = {name: why for name, layer in layers.items() if (why := why_unbounded(layer))}
    layers = {name: layer for name, layer in layers.items() if name not in left}
    data = Data(batches=as_list(batches), forward=forward or forward_batch)
    in_training, at_evaluation = ({n: Reach() for n in layers} for _ in range(2))
    missed: Missed = {}
    for is_training, reaches in ((True, in_training), (False, at_evaluation)):
        with untouched(model, training=is_training), _watched(layers, reaches, missed):
            num_batches = data.send(model, "measuring results of norms")
    left |= {name: missed[layer] for name, layer in layers.items() if layer in missed}
    unseen = "no batch has reached it"
    left |= {n: unseen for n, r in in_training.items() if not r.num_values and n not in left}
    rows = tuple(_row(n, in_training[n], at_evaluation[n]) for n in layers if n not in left)
    if not rows:
        raise DataError(f"no batch has reached a norm that can be measured{and_reasons(left)}")
    return OutputBound(layers=rows, num_batches=num_batches, left=unmeasured(model, left))


ESTIMATED = "it normalises by running estimates in training too, so there is no bound"
SEVERAL = "it normalises by several kinds of statistics at once, and the bound is of one"


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of torch with groups, or one of ours that holds no others."""
    if isinstance(module, NormLayer):
        return not any(isinstance(child, NormLayer) for child in module.children())
    return partition_of(module) is not None


def why_unbounded(layer: nn.Module) -> str:
    """Say why a norm's results have no bound of one group; empty if they have."""
    if is_estimated(layer):
        return ESTIMATED
    if partition_of(layer) is None and not isinstance(layer, PositionalNorm):
        return SEVERAL
    return ""


@singledispatch
def partition_of(layer: nn.Module) -> Partition | None:
    """Which elements of the channels-second input share statistics in training."""
    return None


@partition_of.register(NormLayer)
def _(layer: NormLayer) -> Partition | None:
    return layer.partitions.get("statistics")


@partition_of.register(_BatchNorm)
def _(layer: _BatchNorm) -> Partition | None:
    if isinstance(layer, NormLayer):  # our batch norm is one of torch's too
        return layer.partitions.get("statistics")
    return Partition(layer.num_features)


@partition_of.register(_InstanceNorm)
def _(layer: _InstanceNorm) -> Partition:
    return Partition(layer.num_features, 1)


@partition_of.register(nn.GroupNorm)
def _(layer: nn.GroupNorm) -> Partition:
    return Partition(layer.num_groups, 1)


@partition_of.register(nn.LayerNorm)
def _(layer: nn.LayerNorm) -> Partition | None:
    return Partition(1, 1) if len(layer.normalized_shape) == 1 else None


class Reach:
    """How far the results of a norm reach."""

    def __init__(self) -> None:
        self.largest, self.share = 0.0, 0.0
        self.num_values = 0

    def add(self, results: Tensor, num_values: Tensor) -> None:
        """Take results and the number of values behind each into account."""
        sizes = results.abs()
        bounds = (num_values - 1).double().sqrt()
        self.largest = _larger(self.largest, sizes.max().item())
        self.share = _larger(self.share, (sizes / bounds.clamp(min=1e-300)).max().item())
        smallest = int(num_values.min())
        self.num_values = min(self.num_values or smallest, smallest)


def _larger(old: float, new: float) -> float:
    return new if math.isnan(new) else max(old, new)


@contextmanager
def _watched(
    layers: dict[str, nn.Module], reaches: dict[str, Reach], missed: Missed
) -> Generator[None]:
    with ExitStack() as stack:
        for name, layer in layers.items():
            see = partial(_see, layer, reaches[name])
            stack.enter_context(watch_inputs(layer, see, missed=missed))
        yield


@torch.no_grad()
def _see(layer: nn.Module, reach: Reach, x: Tensor, valid: Tensor | None = None) -> None:
    if x.numel() == 0:
        return
    wide = x.detach().double()
    ids = Part(partition=partition_of(layer)).index(x.shape).to(x.device).flatten()
    counted = torch.ones_like(ids, dtype=torch.bool)
    if valid is not None:
        counted = valid.expand_as(x).flatten()
    counts = torch.bincount(ids[counted], minlength=int(ids.max()) + 1)
    if evaluates_by_running(layer):
        results = evaluated(layer, wide).flatten()
    else:
        results = by_definition(wide.flatten(), ids, counts, counted, _eps(layer))
    reach.add(results[counted], counts[ids][counted])


def _eps(layer: nn.Module) -> float:
    return float(layer.eps)  # type: ignore[arg-type]


def evaluates_by_running(layer: nn.Module) -> bool:
    """Whether a norm uses running statistics in the mode that it is in."""
    has_running = getattr(layer, "running_mean", None) is not None
    return not layer.training and has_running


def by_definition(x: Tensor, ids: Tensor, counts: Tensor, counted: Tensor, eps: float) -> Tensor:
    """Normalise values ``(n,)`` by the mean and biased variance of those with the same id."""

    def mean(values: Tensor) -> Tensor:
        sums = torch.zeros_like(counts, dtype=torch.float64)
        return sums.index_add_(0, ids[counted], values[counted]) / counts.clamp(min=1)

    centred = x - mean(x)[ids]
    return centred / (mean(centred.square())[ids] + eps).sqrt()


def evaluated(layer: nn.Module, x: Tensor) -> Tensor:
    """What a norm makes of its input at evaluation, without scale and shift."""
    if isinstance(layer, NormLayer):
        kept = dict(layer._parameters)
        layer._parameters.update(dict.fromkeys(kept))
        try:
            return type(layer)._normalize(layer, x, None)
        finally:
            layer._parameters.update(kept)
    mean, var = (getattr(layer, name).double() for name in ("running_mean", "running_var"))
    return functional.batch_norm(x, mean, var, eps=_eps(layer))


def _row(name: str, training: Reach, evaluation: Reach) -> LayerBound:
    return LayerBound(
        name=name,
        num_values=training.num_values,
        bound=math.sqrt(training.num_values - 1),
        largest_training=training.largest,
        largest_evaluation=evaluation.largest,
        share=training.share,
    )
