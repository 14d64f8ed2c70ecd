"""Which example weight is best: a grid, a closer look around its best point, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.errors import DataError, OptionError
from normkit.passes import Forward, all_or_nothing, as_list, forward_batch, require_bare
from normkit.tune.gain import Gain, paired_gain, standard_error
from normkit.tune.gradient import descend
from normkit.tune.grids import grid_for, read_grid
from normkit.tune.layers import WeighedLayers, Weights, one_for_all
from normkit.tune.metrics import Metric, Score, read_metric
from normkit.tune.result import CurvePoint, Tuning
from normkit.tune.sweep import Sweep

CLOSE_ENOUGH = 0.01  # width of the bracket at which the golden section ends
STEPS_BETWEEN = 8  # weights tried between two of the grid, for a metric without a slope
GOLDEN = (math.sqrt(5) - 1) / 2
CHOOSES, JUDGES = slice(0, None, 2), slice(1, None, 2)  # examples, by their places
MIN_EXAMPLES = 4


@all_or_nothing
def tune_example_weight(  # noqa: PLR0913 - what is tuned, on what, for what, how closely
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

    Every batch norm of torch becomes ours in place, with the same function and the same names in
    the state dict. The examples at even places choose ``alpha``; those at odd places, which had no
    part in that, say what it gains against the weights that the layers have (0 of batch norms, 1
    of norms of examples that track statistics, unless they were set). Unless the interval of this
    gain lies above 0, the layers keep those: what is best of a grid is better on the data that
    chose it, even where all differences are noise.

    Weights share a forward where the model lets them, each with its own copy of the batch; what
    comes before the first norm is computed once for all of them.

    Args:
        model: Any model with batch norms of torch or layers of normkit with running statistics.
        batches: Held-out data: pairs ``(inputs, target)``, or what ``forward`` takes; independent
            examples, none of which the model was trained on. Read once and kept.
        metric: ``"loss"``, the cross entropy of scores ``(N, K)`` with targets ``(N,)``;
            ``"accuracy"``; or ``metric(output, batch)``, which gives one value for each example.
        grid: Weights to try, from 0 to 1; those that the layers have are tried in any case. By
            default 14 that are dense at both ends, and three more next to 1 where a layer has the
            weight 1, as norms of examples do.
        per_layer: Find a weight for each layer: 20 steps of Adam by the gradient of the metric,
            from the best common one.
        refine: Look closer between the neighbours of the grid's best point: by golden section
            until 0.01 is left; for the accuracy, which has steps and no slope, at eight weights
            between them. Of weights that are equally good the middle one is taken, and the result
            says how many they are.
        forward: ``forward(model, batch)`` for batches of another form.
        larger_is_better: Of a ``metric`` that is a function, whether larger values are better.

    Returns:
        The chosen weight with its gain, and the curve over all weights; ``undo`` brings back the
        model as it was.

    Raises:
        OptionError: If the model has nothing to weigh, is wrapped or compiled, or an option has a
            value that it cannot have; ``per_layer`` with ``"accuracy"`` among them.
        DataError: If there are fewer than 4 examples, a batch needs ``forward``, reaches no layer,
            or the metric does not give one finite value for each example.

    Numerics:
        Scores and gains are float64. The interval of a mean is the normal one, of accuracies that
        of Agresti & Min.

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
    require_bare(model, "tune")
    layers = WeighedLayers(model)
    sweep = Sweep(layers, measured, forward or forward_batch, as_list(batches))
    layers.convert_()
    alphas = alphas or grid_for(layers.weights.values())
    found = _searched(sweep, alphas, per_layer, refine)
    layers.set_(found.alpha)
    return found


def _searched(sweep: Sweep, alphas: tuple[float, ...], per_layer: bool, refine: bool) -> Tuning:
    table = _Table(sweep, alphas)
    if refine:
        table.refine()
    shared, tied = table.best()
    chosen: Weights = shared if table.choosing(shared) > 0 else table.before
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
    """The weights from before, layer by layer if that is how others were chosen."""
    if isinstance(chosen, Mapping) and not isinstance(before, Mapping):
        return dict.fromkeys(sweep.layers.named, before)
    return before


class _Table:
    """Scores of every example under every common weight that was tried, and as the model was."""

    def __init__(self, sweep: Sweep, alphas: tuple[float, ...]) -> None:
        self.sweep, self.metric = sweep, sweep.metric
        self.before = one_for_all(sweep.layers.weights)
        alone = () if isinstance(self.before, Mapping) else (self.before,)
        self.rows: dict[float, Tensor] = {}
        _require_others(alphas, alone)
        self._try(tuple(sorted({*alphas, *alone})))
        self.scores_before = self.rows[alone[0]] if alone else sweep.scores_of(self.before)
        _require_examples(self.scores_before, self.metric)

    def gains(self, alpha: float) -> Tensor:
        """What every example gains against the weights from before."""
        return self.metric.gains(self.rows[alpha], self.scores_before)

    def choosing(self, alpha: float) -> float:
        """Mean gain of the examples that choose; the worst there is where it is no number."""
        if alpha not in self.rows:
            self._try((alpha,))
        mean = self.gains(alpha)[CHOOSES].mean().item()
        return -math.inf if math.isnan(mean) else mean

    def best(self) -> tuple[float, tuple[float, ...]]:
        """The weight with the largest gain, and all that have it.

        Of several it is the one from before, else the middle one: next to the ends of a plateau
        others are worse.
        """
        gains = {alpha: self.choosing(alpha) for alpha in sorted(self.rows)}
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
            golden_section(self.choosing, low, high)

    def gain_of(self, weights: Weights) -> Gain:
        """Gain of the examples that had no part in choosing."""
        if isinstance(weights, float):
            differences = self.gains(weights)
        else:  # both in plain forwards, so that rounding is no gain where all weights are the same
            before = self.sweep.scores_of(self.before)
            differences = self.metric.gains(self.sweep.scores_of(weights), before)
        return paired_gain(differences[JUDGES], self.metric.binary)

    def points(self) -> Iterator[CurvePoint]:
        """Means over all examples, in the order of the weights."""
        for alpha, scores in sorted(self.rows.items()):
            gains = self.gains(alpha)
            mean, gain = scores.mean().item(), gains.mean().item()
            yield CurvePoint(alpha, mean, len(scores), gain, standard_error(gains))

    def _try(self, alphas: tuple[float, ...]) -> None:
        self.rows |= zip(alphas, self.sweep.scores(alphas), strict=True)


def golden_section(value: Callable[[float], float], low: float, high: float) -> None:
    """Ask for values ever closer to where they are largest between two ends.

    Args:
        value: Has one maximum between the ends; keeps what it has found.
        low: Lower end.
        high: Upper end.
    """
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while high - low > CLOSE_ENOUGH:
        if value(left) >= value(right):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)


def _require_others(alphas: tuple[float, ...], before: tuple[float, ...]) -> None:
    """Refuse a grid without a weight that the layers do not have already."""
    if not set(alphas) - set(before):
        raise OptionError(
            f"grid={alphas} was given, and {before[0]:g} is what the layers have; give at least "
            f"one other weight, such as (0.1, 0.3)"
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
            f"weights that the layers have; "
            f"see what the model makes of them before tuning it"
        )
