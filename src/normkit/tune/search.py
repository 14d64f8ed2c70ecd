"""Find the best example weight: try a grid, refine around its best point, measure the gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.errors import DataError, OptionError
from normkit.passes import Forward, all_or_nothing, as_list, forward_batch, require_unwrapped
from normkit.tune.gain import Gain, paired_gain, standard_error
from normkit.tune.gradient import descend
from normkit.tune.grids import grid_for, read_grid
from normkit.tune.layers import WeighedLayers, Weights, common_weight
from normkit.tune.metrics import Metric, Score, read_metric
from normkit.tune.result import CurvePoint, Tuning
from normkit.tune.sweep import Sweep

BRACKET_WIDTH = 0.01  # The golden section search ends at this width.
STEPS_BETWEEN = 8  # weights between two of the grid, for a metric without a gradient
GOLDEN = (math.sqrt(5) - 1) / 2
CHOOSING, JUDGING = slice(0, None, 2), slice(1, None, 2)  # examples at even and at odd places
MIN_EXAMPLES = 4


@all_or_nothing
def tune_example_weight(  # noqa: PLR0913 - model, data, metric and search have own options
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: Literal["loss", "accuracy"] | Score = "loss",
    grid: Sequence[float] | None = None,
    per_layer: bool = False,
    refine: bool = True,
    forward: Forward | None = None,
    larger_is_better: bool = True,
) -> Tuning:
    r"""Choose the example weight of a trained model on held-out data, and set it.

    .. math::  m = \alpha e + (1 - \alpha) m_r, \quad
               v = \alpha v_e + (1 - \alpha) v_r + \alpha (1 - \alpha) (e - m_r)^2

    At evaluation a layer normalises by the mean :math:`m` and variance :math:`v`, which mix an
    example's own statistics :math:`e, v_e` with the running statistics :math:`m_r, v_r`.

    Every batch norm of torch is replaced in place by normkit's, which computes the same and has the
    same names in the state dict. The examples at even places choose ``alpha``. Those at odd places
    then judge its gain over the layers' present weights (by default 0 for batch norms, and 1 for
    norms of examples that track statistics). Unless the interval of this gain lies above 0, the
    layers keep their present weights: the best weight of a grid always looks better on the data
    that chose it, even if all differences are noise.

    Where the model allows it, several weights are computed in one forward, each on its own copy of
    the batch; layers before the first norm are then computed once for all weights.

    Args:
        model: Any model with batch norms of torch or layers of normkit with running statistics.
        batches: Held-out data: pairs ``(inputs, target)``, or anything that ``forward`` takes;
            independent examples that the model was not trained on. Read once and kept.
        metric: ``"loss"``, the cross entropy of scores ``(N, K)`` with targets ``(N,)``;
            ``"accuracy"``; or ``metric(output, batch)``, which gives one value for each example.
        grid: Weights to try, from 0 to 1; the layers' present weights are always tried. By
            default 14 weights that are dense at both ends, and three more just below 1 if a layer
            has the weight 1, as norms of examples do.
        per_layer: Find a weight for each layer: 20 steps of Adam by the gradient of the metric,
            from the best common weight.
        refine: Also try weights between the neighbours of the grid's best point: by golden section
            search until the bracket is 0.01 wide; for the accuracy, which has no gradient, eight
            weights at equal distances. Of several equally good weights the middle one is taken, and
            the result says how many there are.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.
        larger_is_better: Whether larger values are better, if ``metric`` is a function.

    Returns:
        The chosen weight with its gain, and the curve over all weights; ``undo`` restores the
        model.

    Raises:
        OptionError: If the model has no layer to set the weight of, is wrapped or compiled, or an
            option has an invalid value, for instance ``per_layer`` with ``"accuracy"``.
        DataError: If there are fewer than 4 examples, a batch needs ``forward`` or reaches no
            layer, or the metric does not give one finite value for each example.

    Numerics:
        Scores and gains are float64. The interval of a mean is the normal one; for accuracies it is
        that of Agresti & Min.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, 3.1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(),
        ...                       nn.Linear(216, 5))
        >>> data = [(torch.randn(8, 3, 8, 8), torch.randint(5, (8,))) for _ in range(2)]
        >>> result = tune_example_weight(model, data, grid=(0, 0.5, 1))
        >>> [point.alpha for point in result.curve if point.alpha in (0, 0.5, 1)]
        [0.0, 0.5, 1.0]
        >>> type(model[1]).__name__, type(result.undo()[1]).__name__
        ('BatchNorm', 'BatchNorm2d')
    """
    measured = read_metric(metric, larger_is_better)
    alphas = None if grid is None else read_grid(grid)
    if per_layer and measured.binary:
        raise OptionError(
            "per_layer=True was given with metric='accuracy', which has no gradient to follow; "
            "tune for metric='loss', or with per_layer=False"
        )
    require_unwrapped(model, "tune")
    layers = WeighedLayers(model)
    sweep = Sweep(layers, measured, forward or forward_batch, as_list(batches))
    layers.convert_()
    alphas = alphas or grid_for(layers.weights.values())
    found = _search(sweep, alphas, per_layer, refine)
    layers.set_(found.alpha)
    return found


def _search(sweep: Sweep, alphas: tuple[float, ...], per_layer: bool, refine: bool) -> Tuning:
    table = _ScoreTable(sweep, alphas)
    if refine:
        table.refine()
    shared, tied = table.best()
    chosen: Weights = shared if table.selection_gain(shared) > 0 else table.before
    if per_layer:
        chosen = descend(sweep, chosen)
    gain = table.gain_of(chosen)
    return Tuning(
        model=sweep.model,
        metric=sweep.metric,
        before=table.before,
        alpha=chosen if gain.significant else _like(chosen, table.before, sweep),
        best=chosen,
        gain=gain,
        shared=shared,
        shared_gain=table.gain_of(shared),
        tied=tied if chosen == shared else (),
        curve=tuple(table.points()),
        how=sweep.how or "one by one",
        _sweep=sweep,
    )


def _like(chosen: Weights, before: Weights, sweep: Sweep) -> Weights:
    """The old weights, as a dict by layer name if the chosen weights are one."""
    if isinstance(chosen, Mapping) and not isinstance(before, Mapping):
        return dict.fromkeys(sweep.layers.named, before)
    return before


class _ScoreTable:
    """Scores of every example for each common weight that was tried, and for the old weights."""

    def __init__(self, sweep: Sweep, alphas: tuple[float, ...]) -> None:
        self.sweep, self.metric = sweep, sweep.metric
        self.before = common_weight(sweep.layers.weights)
        common = () if isinstance(self.before, Mapping) else (self.before,)
        self.rows: dict[float, Tensor] = {}
        _require_others(alphas, common)
        self._try(tuple(sorted({*alphas, *common})))
        self.scores_before = self.rows[common[0]] if common else sweep.scores_of(self.before)
        _require_examples(self.scores_before, self.metric)

    def gains(self, alpha: float) -> Tensor:
        """The gain of every example over the old weights."""
        return self.metric.gains(self.rows[alpha], self.scores_before)

    def selection_gain(self, alpha: float) -> float:
        """Mean gain of the examples that choose; minus infinity if it is NaN."""
        if alpha not in self.rows:
            self._try((alpha,))
        mean = self.gains(alpha)[CHOOSING].mean().item()
        return -math.inf if math.isnan(mean) else mean

    def best(self) -> tuple[float, tuple[float, ...]]:
        """The weight with the largest gain, and all weights with that gain.

        If several have it, the old weight is taken if it is one of them, otherwise the middle one:
        at the ends of a plateau a small change of the weight would be worse.
        """
        gains = {alpha: self.selection_gain(alpha) for alpha in sorted(self.rows)}
        tied = tuple(alpha for alpha, gain in gains.items() if gain == max(gains.values()))
        if not isinstance(self.before, Mapping) and self.before in tied:
            return self.before, tied
        return tied[(len(tied) - 1) // 2], tied

    def refine(self) -> None:
        """Try weights between the neighbours of the best one."""
        tried, (_, tied) = sorted(self.rows), self.best()
        low = tried[max(tried.index(tied[0]) - 1, 0)]
        high = tried[min(tried.index(tied[-1]) + 1, len(tried) - 1)]
        if self.metric.binary:
            steps = range(1, STEPS_BETWEEN + 1)
            between = [round(low + (high - low) * k / (STEPS_BETWEEN + 1), 6) for k in steps]
            self._try(tuple(alpha for alpha in between if alpha not in self.rows))
        else:
            golden_section(self.selection_gain, low, high)

    def gain_of(self, weights: Weights) -> Gain:
        """Gain over the old weights on the examples that judge."""
        if isinstance(weights, float):
            differences = self.gains(weights)
        else:
            # Both are scored by plain forwards: batch copies round differently, and that would
            # look like a gain even if all weights were the same.
            before = self.sweep.scores_of(self.before)
            differences = self.metric.gains(self.sweep.scores_of(weights), before)
        return paired_gain(differences[JUDGING], self.metric.binary)

    def points(self) -> Iterator[CurvePoint]:
        """Means over all examples, in the order of the weights."""
        for alpha, scores in sorted(self.rows.items()):
            gains = self.gains(alpha)
            mean, gain = scores.mean().item(), gains.mean().item()
            yield CurvePoint(alpha, mean, len(scores), gain, standard_error(gains))

    def _try(self, alphas: tuple[float, ...]) -> None:
        self.rows |= zip(alphas, self.sweep.scores(alphas), strict=True)


def golden_section(value: Callable[[float], float], low: float, high: float) -> None:
    """Narrow the interval around the maximum of a function, by golden section search.

    Args:
        value: Function with one maximum between the ends; it keeps its results itself.
        low: Lower end.
        high: Upper end.
    """
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while high - low > BRACKET_WIDTH:
        if value(left) >= value(right):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)


def _require_others(alphas: tuple[float, ...], before: tuple[float, ...]) -> None:
    """Refuse a grid that holds nothing but the layers' present weight."""
    if not set(alphas) - set(before):
        raise OptionError(
            f"grid={alphas} was given, and the layers have the weight {before[0]:g} already; give "
            f"at least one other weight, such as (0.1, 0.3)"
        )


def _require_examples(scores: Tensor, metric: Metric) -> None:
    if len(scores) < MIN_EXAMPLES:
        raise DataError(
            f"{len(scores)} examples were given; half of them choose and half judge, so there "
            f"must be {MIN_EXAMPLES} at least, and hundreds to tell a gain from noise"
        )
    if not torch.isfinite(scores).all():
        number = int((~torch.isfinite(scores)).sum())
        raise DataError(
            f"the {metric.name} of {number} of {len(scores)} examples is not finite with the "
            f"weights that the layers have; look at the model's outputs for them before tuning"
        )
