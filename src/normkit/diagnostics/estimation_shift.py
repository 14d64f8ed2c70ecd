"""Estimation shift: the distance of running statistics from those of the data at evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.core.check import require_choice
from normkit.core.moments import Moments
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.errors import DataError, OptionError
from normkit.inference.norm_classes import is_fixed
from normkit.inference.norm_inputs import Missed, observe_inputs
from normkit.inference.population import Population
from normkit.inference.tracked import (
    Unmeasured,
    Where,
    and_reasons,
    select_layers,
    statistics_of,
    tracked,
    unknown_layers,
    unmeasured,
    why_not_updated,
)
from normkit.layers.base import BUFFERS
from normkit.passes import (
    Data,
    Forward,
    changes_nothing,
    forward_batch,
    unwrap,
)

Normalize = Literal["sqrt_c", "std"]
EPS = 1e-5  # of the model's input, and of layers that do not say


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShift:
    """The estimation shift of one layer.

    Args:
        name: The layer's name; ``"input"`` is the model's input.
        num_groups: Number of values of its running mean: channels, or groups.
        num_values: Number of input values that each statistic was computed from.
        esm_mean: Distance of the running means from the data's means, in the unit of the input.
        esm_std: Distance of the running standard deviations from the data's, in the same unit.
    """

    name: str
    num_groups: int
    num_values: int
    esm_mean: float | None
    esm_std: float | None


@dataclass(frozen=True, kw_only=True)
class EstimationShift(Measurement):
    """Estimation shift of every layer with running statistics.

    Args:
        layers: The model's input first, then the layers in the order of the forward.
        num_batches: Number of batches that were measured.
        normalize: What distances were divided by; None if they were not divided.
        left: Layers with running statistics that were not measured, with the reason.
    """

    layers: tuple[LayerShift, ...]
    num_batches: int
    normalize: Normalize | None = None
    left: tuple[Unmeasured, ...] = ()

    drawn = ("esm_mean", "esm_std")

    @property
    def reading(self) -> str:
        """Where the shift is largest, and whether it grows with depth."""
        return read_finite_rows(self.layers[1:], self._read)

    @staticmethod
    def _read(rows: Sequence[LayerShift]) -> str:
        worst = max(rows, key=_std)
        largest = (
            f"it is largest in {worst.name or 'the model itself'} ({_std(worst):.3g} in the "
            f"standard deviations, {worst.esm_mean or 0.0:.3g} in the means)"
        )
        half = len(rows) // 2
        earlier, later = (sum(map(_std, part)) for part in (rows[:half], rows[len(rows) - half :]))
        if earlier == 0:
            return f"Estimation shift over {len(rows)} layers: {largest}."
        return (
            f"Estimation shift of the later half of the {len(rows)} layers is "
            f"{later / earlier:.2g} times that of the earlier half; {largest}."
        )


def _std(row: LayerShift) -> float:
    return row.esm_std or 0.0


@changes_nothing
def estimation_shift(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    train_batches: Iterable[Any] | None = None,
    where: Where | None = None,
    normalize: Normalize | None = None,
    forward: Forward | None = None,
) -> EstimationShift:
    r"""Measure the distance of running statistics from those of the data that they normalise.

    .. math::  ESM_\mu = \lVert \hat\mu - \mu \rVert_2, \quad
               ESM_\sigma = \lVert \sqrt{\hat\sigma^2} - \sqrt{\sigma^2} \rVert_2

    These are L2 distances over a layer's channels (or groups). :math:`\hat\mu, \hat\sigma^2` are
    the running statistics, and :math:`\mu, \sigma^2` the mean and biased variance of the layer's
    input over all batches, in float64. The model runs in evaluation mode, so earlier layers
    normalise by their running statistics. The input that counts is the tensor that reaches the
    function that normalises. The model is left as it was.

    Args:
        model: Holds norms of torch or normkit with running statistics, or ``FrozenBatchNorm2d``.
        batches: Test data: inputs, pairs ``(inputs, target)`` or dicts of arguments, of any sizes.
        train_batches: Training data. With it the first row is the distance between the statistics
            of the training and the test inputs; without it that row has no values.
        where: ``where(layer, name)`` chooses the layers to measure; by default all.
        normalize: ``"sqrt_c"`` divides by the square root of the number of channels, so that
            layers of different widths can be compared. ``"std"`` first divides each channel's
            difference by :math:`\sqrt{\sigma^2 + \epsilon}`, with the layer's :math:`\epsilon`:
            the distances are then in standard deviations of the data, and layers with inputs of
            different sizes can be compared, too. By default nothing is divided, as in the paper.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.

    Returns:
        A row for each layer; prints, ``to_json``, ``table``, ``plot``.

    Raises:
        OptionError: If no layer has running statistics, or an option is unknown.
        DataError: If there is no batch, or no layer gets an input.

    Source:
        Huang et al., Delving into the Estimation Shift of Batch Normalization in a Network,
        definitions 1 and 2.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
        >>> shift = estimation_shift(model, [torch.randn(n, 3, 8, 8) for n in (8, 8, 1)])
        >>> [row.name for row in shift.layers], shift.layers[1].num_values
        (['input', '1'], 612)
    """
    if normalize is not None:
        require_choice("normalize", normalize, get_args(Normalize))
    model = unwrap(model, "measure")
    fixed = {name: layer for name, layer in model.named_modules() if is_fixed(layer)}
    known = select_layers(tracked(model) | fixed, where)
    if not known:
        raise OptionError(
            f"{type(model).__name__} has no layer with running statistics, so nothing can shift"
        )
    left = {name: why for name, why in unknown_layers(model).items() if name not in fixed}
    # An instance norm of torch that does not update its statistics evaluates without them.
    left |= {
        name: why
        for name, layer in known.items()
        if isinstance(layer, _InstanceNorm) and (why := why_not_updated(layer))
    }
    layers = {name: layer for name, layer in known.items() if name not in left}
    send = forward or forward_batch
    inputs = _observed(model, layers, Data(batches=batches, forward=send))
    left |= {name: inputs.missed[layer] for name, layer in layers.items() if layer in inputs.missed}
    trained = None
    if train_batches is not None:
        data = Data(batches=train_batches, forward=send, name="train_batches")
        trained = _observed(model, {}, data).of_model.moments
    rows = [
        _row(name, population, running_moments(layers[name]), normalize, _eps(layers[name]))
        for name, population in inputs.of_layers.items()
        if population.count and name not in left
    ]
    if not rows:
        raise DataError(f"no layer with running statistics got an input{and_reasons(left)}")
    return EstimationShift(
        layers=(_row("input", inputs.of_model, trained, normalize), *rows),
        num_batches=inputs.num_batches,
        normalize=normalize,
        left=unmeasured(model, left),
    )


class _ModelInput:
    """Collects the statistics of the model's own input, if that has a channel axis."""

    def __init__(self) -> None:
        self._population: Population | None = Population()

    @property
    def population(self) -> Population:
        """Statistics of all inputs; empty if the second axis changes its size: no channel axis."""
        return self._population or Population()

    def add(self, _model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Add the first tensor with two axes or more among the model's arguments."""
        given = (v for v in (*args, *named.values()) if isinstance(v, Tensor))
        x = next((v for v in given if v.ndim > 1), None)
        if x is None or x.numel() == 0 or self._population is None:
            return
        if self._population.count and len(self._population.sums.mean) != x.shape[1]:
            self._population = None
        else:
            self._population.add(x)


class _Inputs(NamedTuple):
    """Statistics of all inputs in one pass over the data.

    Args:
        of_layers: By layer name.
        of_model: Statistics of the model's own input.
        missed: Layers with an input that was not seen, with the reason.
        num_batches: Number of batches.
    """

    of_layers: dict[str, Population]
    of_model: Population
    missed: Missed
    num_batches: int


def _observed(model: nn.Module, layers: dict[str, nn.Module], data: Data) -> _Inputs:
    """Observe the inputs of the layers and of the model, in one pass in evaluation mode."""
    of_layers, model_input = dict[str, Population](), _ModelInput()

    def observe(name: str, x: Tensor, valid: Tensor | None = None) -> None:
        of_layers.setdefault(name, Population(layers[name])).add(x, valid)

    hook = model.register_forward_pre_hook(model_input.add, with_kwargs=True)
    try:
        what = "measuring estimation shift"
        missed, num_batches = observe_inputs(model, layers, observe, data, what)
    finally:
        hook.remove()
    return _Inputs(of_layers, model_input.population, missed, num_batches)


def running_moments(layer: nn.Module) -> Moments:
    """Read a layer's running mean and variance, in float64."""
    mean, var = (statistics_of(layer)[name].double() for name in BUFFERS)
    return Moments(mean, var)


def distances_between(given: Moments, expected: Moments) -> tuple[float, float]:
    """L2 distances of the means, and of the standard deviations, of two tables of moments."""
    mean = (given.mean - expected.mean).norm()
    std = (given.var.sqrt() - expected.var.sqrt()).norm()
    return mean.item(), std.item()


def _eps(layer: nn.Module) -> float:
    """What a layer adds to the variance before it divides by the root."""
    return getattr(layer, "eps", EPS)


def _row(
    name: str,
    population: Population,
    given: Moments | None,
    normalize: Normalize | None,
    eps: float = EPS,
) -> LayerShift:
    expected, distances = population.moments, (None, None)
    size = expected.mean.numel() if population.count else 0
    if given is not None and given.mean.shape == expected.mean.shape and size:
        if normalize == "std":
            given, expected = _in_stds(given, expected, eps), _in_stds(expected, expected, eps)
        scale = 1.0 if normalize is None else size**0.5
        distances = tuple(value / scale for value in distances_between(given, expected))
    return LayerShift(
        name=name,
        num_groups=size,
        num_values=population.count,
        esm_mean=distances[0],
        esm_std=distances[1],
    )


def _in_stds(table: Moments, unit: Moments, eps: float) -> Moments:
    """Moments of the inputs after each channel is divided by its standard deviation in the data."""
    var = unit.var + eps
    return Moments(table.mean / var.sqrt(), table.var / var)
