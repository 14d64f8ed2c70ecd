"""Estimation shift: how far running statistics are from those of the data they normalise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.core.check import require_choice
from normkit.core.moments import Moments
from normkit.diagnostics.measurement import Measurement, read_sound
from normkit.errors import DataError, OptionError
from normkit.inference.known import is_fixed
from normkit.inference.population import Population
from normkit.inference.reaching import Missed, reaching
from normkit.inference.tracked import (
    Unmeasured,
    Where,
    and_reasons,
    chosen,
    foreign,
    statistics_of,
    tracked,
    unmeasured,
    why_still,
)
from normkit.layers.base import BUFFERS
from normkit.passes import (
    Data,
    Forward,
    changes_nothing,
    forward_batch,
    require_batches,
    untouched,
    unwrap,
)

Normalize = Literal["sqrt_c"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShift:
    """The shift of one layer.

    Args:
        name: Its name; ``"input"`` is the model's input.
        num_groups: Values of its running mean: channels, or groups.
        num_values: Values of its input behind each of them.
        esm_mean: Distance of the running mean from the expected one, in the unit of the input.
        esm_std: Distance of the running standard deviation from the expected one, likewise.
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
        layers: The model's input first, then layers in the order of the forward.
        num_batches: Batches that were measured.
        normalize: What the distances were divided by: nothing, or the root of their number.
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
        return read_sound(self.layers[1:], self._read)

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
    r"""Measure how far running statistics are from those of the data they normalise.

    .. math::  ESM_\mu = \lVert \hat\mu - \mu \rVert_2, \quad
               ESM_\sigma = \lVert \sqrt{\hat\sigma^2} - \sqrt{\sigma^2} \rVert_2

    over a layer's channels (or groups), with the running :math:`\hat\mu, \hat\sigma^2` and the
    mean and biased variance of its input over all batches, in float64, the model at evaluation:
    layers before it normalise by their running statistics. A layer's input is what reaches the
    function that normalises. The model is left as it was.

    Args:
        model: Holds norms of torch or ours with running statistics, or ``FrozenBatchNorm2d``.
        batches: Test data: inputs, ``(inputs, target)`` or dicts of arguments, of any sizes.
        train_batches: Training data: the first row is then the distance between the statistics of
            the two inputs; without it that row has no values.
        where: ``where(layer, name)`` says which layers are meant; by default all.
        normalize: ``"sqrt_c"`` divides by the root of the number of channels, so that layers of
            different widths compare; by default nothing does, as in the paper.
        forward: ``forward(model, batch)`` for batches of another form.

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
        require_choice("normalize", normalize, ("sqrt_c",))
    model = unwrap(model, "measure")
    fixed = {name: layer for name, layer in model.named_modules() if is_fixed(layer)}
    known = chosen(tracked(model) | fixed, where)
    if not known:
        raise OptionError(
            f"{type(model).__name__} has no layer with running statistics, so nothing can shift"
        )
    left = {name: why for name, why in foreign(model).items() if name not in fixed}
    still = {n: why_still(layer) for n, layer in known.items() if isinstance(layer, _InstanceNorm)}
    left |= {name: why for name, why in still.items() if why}  # they evaluate without statistics
    layers = {name: layer for name, layer in known.items() if name not in left}
    send = forward or forward_batch
    seen = _observed(model, layers, Data(batches=batches, forward=send))
    left |= {name: seen.missed[layer] for name, layer in layers.items() if layer in seen.missed}
    trained = None
    if train_batches is not None:
        data = Data(batches=train_batches, forward=send, name="train_batches")
        trained = _observed(model, {}, data).entry.moments
    rows = [
        _row(name, population, running_moments(layers[name]), normalize)
        for name, population in seen.layers.items()
        if population.count and name not in left
    ]
    if not rows:
        raise DataError(f"no layer with running statistics got an input{and_reasons(left)}")
    return EstimationShift(
        layers=(_row("input", seen.entry, trained, normalize), *rows),
        num_batches=seen.num_batches,
        normalize=normalize,
        left=unmeasured(model, left),
    )


class _Entry:
    """Sees what the model itself is given, as far as that has channels."""

    def __init__(self) -> None:
        self._population: Population | None = Population()

    @property
    def population(self) -> Population:
        """What was seen; nothing if the second axis changes its size, and counts no channels."""
        return self._population or Population()

    def see(self, _model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Take the first tensor that the model is given."""
        given = (v for v in (*args, *named.values()) if isinstance(v, Tensor))
        x = next((v for v in given if v.ndim > 1), None)
        if x is None or x.numel() == 0 or self._population is None:
            return
        if self._population.count and len(self._population.sums.mean) != x.shape[1]:
            self._population = None
        else:
            self._population.add(x)


class _Seen(NamedTuple):
    """What one pass has shown: inputs of layers by name, the model's own, and who was missed."""

    layers: dict[str, Population]
    entry: Population
    missed: Missed
    num_batches: int


def _observed(model: nn.Module, layers: dict[str, nn.Module], data: Data) -> _Seen:
    """Let the layers, and the model's input, be seen in one pass at evaluation."""
    seen, missed, entry = dict[str, Population](), Missed(), _Entry()

    def see(name: str, x: Tensor, valid: Tensor | None = None) -> None:
        seen.setdefault(name, Population(layers[name])).add(x, valid)

    with untouched(model, training=False), ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(entry.see, with_kwargs=True).remove)
        for name, layer in layers.items():
            stack.enter_context(reaching(layer, partial(see, name), missed=missed))
        num_batches = data.send(model, "measuring estimation shift")
    require_batches(num_batches, data.name)
    return _Seen(seen, entry.population, missed, num_batches)


def running_moments(layer: nn.Module) -> Moments:
    """Running mean and variance of a layer, in float64."""
    mean, var = (statistics_of(layer)[name].double() for name in BUFFERS)
    return Moments(mean, var)


def distances_between(given: Moments, expected: Moments) -> tuple[float, float]:
    """Lengths of the differences of two tables' means and of their standard deviations."""
    mean = (given.mean - expected.mean).norm()
    std = (given.var.sqrt() - expected.var.sqrt()).norm()
    return mean.item(), std.item()


def _row(
    name: str, population: Population, given: Moments | None, normalize: Normalize | None
) -> LayerShift:
    expected, distances = population.moments, (None, None)
    size = expected.mean.numel() if population.count else 0
    if given is not None and given.mean.shape == expected.mean.shape and size:
        scale = size**0.5 if normalize == "sqrt_c" else 1.0
        distances = tuple(value / scale for value in distances_between(given, expected))
    return LayerShift(
        name=name,
        num_groups=size,
        num_values=population.count,
        esm_mean=distances[0],
        esm_std=distances[1],
    )
