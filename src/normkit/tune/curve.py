"""Accuracy and loss of a trained model over its example weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.convert import convert_norm_
from normkit.diagnostics.measurement import Measurement, new_figure
from normkit.errors import DataError, OptionError
from normkit.inference import recalibrate
from normkit.inference.tracked import Unmeasured, unmeasured
from normkit.layers.over_example import GroupNorm
from normkit.passes import Forward, as_list, changes_nothing, forward_batch, unwrap
from normkit.tune.grids import grid_for, read_grid
from normkit.tune.layers import WeighedLayers, Weights, common_weight
from normkit.tune.metrics import Metric, scores_and_targets
from normkit.tune.sweep import Sweep

TOP = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPoint:
    """A model at one example weight, over all examples.

    Args:
        alpha: The weight, the same in all layers; None where layers have different ones.
        top1: Share of examples whose class has the largest score.
        top5: Share of those whose class is among the five largest; None of five classes or fewer.
        loss: Mean cross entropy.
    """

    alpha: float | None
    top1: float
    top5: float | None
    loss: float


@dataclass(frozen=True, kw_only=True)
class WeightCurve(Measurement):
    """Accuracy and loss over the example weight.

    Args:
        points: One for each weight, in rising order.
        own: The model with the weights that its layers have: 0 of batch norms, 1 of group norms.
        num_layers: Layers that are weighed.
        num_examples: Examples behind each point.
        left: Batch norms that are not weighed, with the reason.
    """

    points: tuple[WeightPoint, ...]
    own: WeightPoint
    num_layers: int
    num_examples: int
    left: tuple[Unmeasured, ...] = ()

    drawn = ("top1", "top5", "loss")

    @property
    def rows(self) -> tuple[WeightPoint, ...]:
        """The points."""
        return self.points

    def best(self, column: str) -> WeightPoint:
        """The point that is best in a column; of several the one next to the layers' own weight.

        Args:
            column: ``"top1"``, ``"top5"`` or ``"loss"``.

        Raises:
            OptionError: If it is none of these, or there is no top 5.
        """
        if column not in self.drawn or getattr(self.own, column) is None:
            raise OptionError(
                f"column={column!r} was given; it is one of {', '.join(self._columns)}"
            )
        sign = -1 if column == "loss" else 1
        own = self.own.alpha or 0.0
        return max(
            self.points, key=lambda p: (sign * getattr(p, column), -abs((p.alpha or 0.0) - own))
        )

    @property
    def _columns(self) -> list[str]:
        return [name for name in self.drawn if getattr(self.own, name) is not None]

    @property
    def reading(self) -> str:
        """The best weight for each column, and what it gains."""
        gains = [self._gain(name) for name in self._columns]
        own = "different" if self.own.alpha is None else f"{self.own.alpha:g}"
        return (
            f"Against the layers' own weights ({own}), on {self.num_examples:,} examples: "
            f"{'; '.join(gains)}. The same examples chose and judged: nk.tune_example_weight "
            f"judges by others."
        )

    def _gain(self, column: str) -> str:
        best = self.best(column)
        gain = getattr(best, column) - getattr(self.own, column)
        if column == "loss":
            change = f"{100 * gain / self.own.loss:+.2g} %" if self.own.loss else f"{gain:+.2g}"
            return f"loss {change} at {best.alpha:g}"
        return f"top {column[3:]} {100 * gain:+.2g} points at {best.alpha:g}"

    def plot(self) -> Any:
        """Draw a panel for each column; weights are spaced evenly, so that both ends are seen.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        columns = self._columns
        figure = new_figure(figsize=(4 * len(columns), 3.4), layout="constrained")
        names = [f"{point.alpha:g}" for point in self.points]
        places = range(len(names))
        for axes, column in zip(figure.subplots(1, len(columns)), columns, strict=True):
            axes.plot(places, [getattr(p, column) for p in self.points], marker="o", markersize=3)
            axes.axhline(getattr(self.own, column), color="#1d2126", linewidth=0.8, linestyle=":")
            axes.axvline(self.points.index(self.best(column)), color="#c2410c", linewidth=0.8)
            axes.set_xticks(places, names, rotation=90, fontsize=7)
            axes.set_xlabel("example weight alpha")
            axes.set_title(column if column == "loss" else f"top {column[3:]} accuracy", fontsize=9)
        return figure


@changes_nothing
def example_weight_curve(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    grid: Sequence[float] | None = None,
    train_batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> WeightCurve:
    r"""Evaluate a trained classifier at many example weights: accuracy and loss.

    .. math::  m = \alpha e + (1 - \alpha) m_r, \quad
               v = \alpha v_e + (1 - \alpha) v_r + \alpha (1 - \alpha) (e - m_r)^2

    Of batch norms :math:`\alpha = 0` is the usual evaluation, of norms of examples
    :math:`\alpha = 1`. Several weights share a forward where the model lets them. The work is done
    on a copy; the model is left as it was. ``tune_example_weight`` sets the best weight.

    Args:
        model: Any classifier with batch norms of torch, timm or normkit, layers of normkit with
            running statistics, or, with ``train_batches``, group norms.
        batches: Held-out pairs ``(inputs, target)``; outputs are scores ``(N, K)`` and targets
            whole numbers ``(N,)``. Read once and kept.
        grid: Weights to try, from 0 to 1; by default as in ``tune_example_weight``.
        train_batches: Training data for running statistics of group norms that have none: those of
            their inputs in all of these batches.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        A point for each weight, with the share of right answers among the first and the first five
        and the mean cross entropy.

    Raises:
        OptionError: If there is nothing to weigh, the model is wrapped or compiled, a weight lies
            outside 0 to 1, or ``train_batches`` is given and no group norm is without statistics.
        DataError: If there is no batch, or one or its output is something else.

    Numerics:
        Losses and means are float64.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, figs. 1
        and 2.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(),
        ...                       nn.Linear(216, 8))
        >>> data = [(torch.randn(8, 3, 8, 8), torch.arange(8)) for _ in range(2)]
        >>> curve = example_weight_curve(model, data, grid=(0.9, 1.0), train_batches=data)
        >>> [point.alpha for point in curve.points], curve.own.alpha
        ([0.9, 1.0], 1.0)
    """
    model = unwrap(model, "measure")
    alphas = None if grid is None else read_grid(grid)
    with torch.inference_mode(False):
        copied = copy.deepcopy(model)
    if train_batches is not None:
        _track_(copied, train_batches, forward)
    layers = WeighedLayers(copied)
    layers.convert_()
    sweep = Sweep(layers, _Classes(), forward or forward_batch, as_list(batches))
    own = common_weight(layers.weights)
    tried = alphas or grid_for(layers.weights.values())
    scores = sweep.scores(tried)
    if not scores.shape[-1]:
        raise DataError("the batches have no example; give held-out pairs (inputs, target)")
    return WeightCurve(
        points=tuple(_point(a, each) for a, each in zip(tried, scores, strict=True)),
        own=_own_point(own, tried, scores, sweep),
        num_layers=len(layers.named),
        num_examples=scores.shape[-1],
        left=unmeasured(copied, dict.fromkeys(untracked_groups(copied), UNTRACKED) | layers.left),
    )


class _Classes(Metric):
    """Right answers, those among the first five, and cross entropy: three rows of scores."""

    def __init__(self) -> None:
        super().__init__(name="accuracy and loss", score=scores_and_targets, larger_is_better=True)  # type: ignore[arg-type]

    def of(self, output: Any, batch: Any) -> Tensor:
        """Scores of a batch, ``(3, n)`` in float64; NaN for the first five of too few classes."""
        scores, target = scores_and_targets(output, batch)
        right = (scores.argmax(1) == target).double()
        if scores.shape[1] > TOP:
            among = (scores.topk(TOP).indices == target[:, None]).any(1).double()
        else:
            among = torch.full_like(right, torch.nan)
        loss = functional.cross_entropy(scores.double(), target, reduction="none")
        return torch.stack([right, among, loss])


def _point(alpha: float | None, scores: Tensor) -> WeightPoint:
    top1, top5, loss = scores.mean(dim=-1).tolist()
    return WeightPoint(alpha=alpha, top1=top1, top5=None if math.isnan(top5) else top5, loss=loss)


def _own_point(own: Weights, tried: Sequence[float], scores: Tensor, sweep: Sweep) -> WeightPoint:
    """The model as its layers have it."""
    if own in tried:
        return _point(own, scores[tried.index(own)])  # type: ignore[arg-type]
    return _point(None if isinstance(own, Mapping) else own, sweep.scores_of(own))


UNTRACKED = "it has no running statistics; with train_batches= they are measured"


def untracked_groups(model: nn.Module) -> dict[str, int]:
    """Groups of the group norms that have no running statistics."""
    return {
        name: module.num_groups
        for name, module in model.named_modules()
        if isinstance(module, nn.GroupNorm | GroupNorm)
        and getattr(module, "running_mean", None) is None
    }


def _track_(model: nn.Module, train_batches: Iterable[Any], forward: Forward | None) -> None:
    """Give group norms without running statistics those of their inputs.

    Raises:
        OptionError: If there is none, or the model is itself one.
    """
    found = untracked_groups(model)
    if not found or "" in found:
        has = "is itself a group norm" if found else "has no group norm without running statistics"
        raise OptionError(
            f"train_batches= was given, and {type(model).__name__} {has}; they are for the running "
            f"statistics of group norms inside of a model"
        )
    specs = {name: f"gn:{groups}:track_running_stats" for name, groups in found.items()}
    convert_norm_(model, specs)
    recalibrate(model, train_batches, where=lambda _, name: name in found, forward=forward).apply()
