r"""Scales and shifts of new layers, from data: each puts out what the old one did.

With the moments :math:`(m, s^2)` of a channel of the old layer's output, and those of the new
layer's output before scale and shift, :math:`(\mu, \sigma^2)`:

.. math::  \gamma = \pm s / \sigma, \quad \beta = m - \gamma \mu

A scale keeps its sign. Running statistics are measured first: they follow an upstream that has
changed. Layers are solved in the order of the forward, each with its upstream already solved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.convert.adapters import adapters_of
from normkit.convert.agreement import Calibration, Outputs, agreement, tensors_of
from normkit.convert.plan import Step
from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.errors import DataError
from normkit.inference.measure import values_of
from normkit.inference.population import Population
from normkit.inference.tracked import feature_map
from normkit.layers.base import NormLayer, TrackingLayer
from normkit.layers.parts import Slot
from normkit.passes import (
    Forward,
    as_list,
    device_of,
    first_calls,
    forward_batch,
    inputs_of,
    moved,
    progress,
    untouched,
)


class Calibrator:
    """Takes down what the old layers put out, and later makes the new ones do the same.

    Args:
        model: The model before the swap, left as it was.
        steps: Old layers and new ones.
        batches: Read once and kept.
        forward: How a batch is sent through the model.

    Raises:
        DataError: If there is no batch, one that needs ``forward``, or one whose values overflow or
            are NaN; or if the model has no values, or none reaches a norm.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Sequence[Step],
        batches: Iterable[Any],
        forward: Forward | None,
    ) -> None:
        self._steps: dict[nn.Module, Step] = {step.new: step for step in steps}
        if any(parameter.is_meta for parameter in model.parameters()):
            raise DataError(
                "the model is on the meta device and has no values to calibrate; load its weights "
                "first, or leave calibrate= out"
            )
        self._batches = as_list(batches)
        self._forward = forward or forward_batch
        self._targets = {new: Population() for new in self._steps}
        with ExitStack() as stack:
            for new, step in self._steps.items():
                stack.callback(_watch(step, self._targets[new]))
            self._before = self._outputs(model, "measuring the original")
        if self._steps and not any(target.count for target in self._targets.values()):
            raise DataError(
                f"calibrate= has brought no value to any of the {len(self._steps)} norms; its "
                f"batches are empty, or go past these layers"
            )
        for new, step in self._steps.items():
            _require_finite(self._targets[new], step, "original")
        self._again = self._outputs(model, "measuring the original again")

    def run(self, model: nn.Module) -> Calibration:
        """Solve all new layers of the model after the swap, from front to back."""
        plain = self._outputs(model, "measuring the plain swap")
        with self._evaluation(model):
            calls = first_calls(model, self._steps, self._batches[0], self._forward)
        skipped = [(s.change.name, "not called") for n, s in self._steps.items() if n not in calls]
        for new, num_calls in progress(calls.items(), "calibrating norms", len(calls)):
            step = self._steps[new]
            reason = self._solve(_Place(model, step.new, num_calls))
            skipped += [(step.change.name, reason)] if reason else []
        calibrated = self._outputs(model, "measuring the calibrated model")
        return Calibration(
            num_batches=len(self._batches),
            num_layers=len(self._steps) - len(skipped),
            skipped=tuple(skipped),
            original=agreement(self._again, self._before),
            plain=agreement(plain, self._before),
            calibrated=agreement(calibrated, self._before),
        )

    def _outputs(self, model: nn.Module, what: str) -> Outputs:
        device = device_of(model)
        with self._evaluation(model), torch.no_grad():
            return [
                tensors_of(self._forward(model, moved(batch, device)))
                for batch in progress(self._batches, what)
            ]

    def _solve(self, place: _Place) -> str:
        """Solve one layer; return the reason if that cannot be done."""
        new, target = place.layer, self._targets[place.layer]
        if target.count == 0:
            return "the old layer was not called"
        for layer in new.modules():
            if isinstance(layer, TrackingLayer) and layer.running_mean is not None:
                self._settle_statistics(place, layer)
        slots = new.last_affine_slots()
        if any(slot.layer.weight is None for slot in slots):
            return "it has no scale"
        carried = [_set_to_one(slot.layer) for slot in slots]
        found = Population()
        with self._evaluation(place.model):
            for y in self._normalised(place):
                found.add(y)
        _require_finite(found, self._steps[new], "converted")
        for slot, weight in zip(slots, carried, strict=True):
            _fit(slot, weight, target.moments, found.moments)
        return ""

    def _settle_statistics(self, place: _Place, layer: TrackingLayer) -> None:
        population = Population(layer)
        with self._evaluation(place.model):
            for x in self._inputs(place, layer):
                population.add(feature_map(place.layer, x))
        name = self._steps[place.layer].change.name
        for buffer, values in values_of(name, layer, population.sums).items():
            layer.get_buffer(buffer).copy_(values)

    def _normalised(self, place: _Place) -> Iterator[Tensor]:
        """Give the layer's outputs, channels second, without its activation."""
        new = place.layer
        activation, _ = adapters_of(new)
        outputs = self._inputs(place, new if activation is None else activation.drop)
        for values in outputs:
            with torch.no_grad():
                y = new(values) if activation is None else values
            yield feature_map(new, y)

    def _inputs(self, place: _Place, layer: nn.Module) -> Iterator[Tensor]:
        return inputs_of(place.model, layer, self._batches, place.num_calls, self._forward)

    @staticmethod
    def _evaluation(model: nn.Module) -> AbstractContextManager[None]:
        return untouched(model, training=False)


class _Place(NamedTuple):
    """A new layer in its model, and how often a forward calls it."""

    model: nn.Module
    layer: NormLayer
    num_calls: int


def _require_finite(population: Population, step: Step, which: str) -> None:
    """Refuse to solve for values that are none.

    Raises:
        DataError: With the layer's name.
    """
    mean, squares = population.sums[2:]
    if not (mean.isfinite().all() and squares.isfinite().all()):
        raise DataError(
            f"on these batches {step.change.name or 'the norm'} of the {which} model puts out NaN "
            f"or infinity; look into the batches and, in 16 bits, into the range of the values"
        )


def _watch(step: Step, population: Population) -> Any:  # noqa: ANN401
    """Let a population see what the old layer normalises, before its activation."""
    activation, _ = adapters_of(step.new)

    def see_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        population.add(feature_map(step.new, args[0]))

    def see_output(_module: nn.Module, _args: Any, output: Tensor) -> None:  # noqa: ANN401
        population.add(feature_map(step.new, output))

    if activation is None:
        return step.old.register_forward_hook(see_output, prepend=True).remove
    inside = any(module is activation.drop for module in step.old.children())
    after = activation.drop if inside else activation.act
    return after.register_forward_pre_hook(see_input, prepend=True).remove


@torch.no_grad()
def _set_to_one(layer: NormLayer) -> Tensor:
    """Set scale and shift to 1 and 0, if there is a shift; return the scale that was."""
    weight = layer.get_parameter("weight").detach().clone()
    layer.get_parameter("weight").fill_(1)
    if layer.bias is not None:
        layer.bias.fill_(0)
    return weight


@torch.no_grad()
def _fit(slot: Slot, carried: Tensor, target: Moments, found: Moments) -> None:
    """Set the scale and shift with which the moments found become those wanted."""
    runs = Partition(num_groups=carried.numel())
    wanted, given = (runs.pool(_part(moments, slot)) for moments in (target, found))
    sign = torch.where(carried < 0, -1.0, 1.0).double()
    solved = sign * (wanted.var[0] / given.var[0]).sqrt()
    weight = torch.where(given.var[0] > 0, solved, carried.double())  # constant: nothing to scale
    slot.layer.get_parameter("weight").copy_(weight)
    if slot.layer.bias is not None:
        slot.layer.bias.copy_(wanted.mean[0] - weight * given.mean[0])


def _part(moments: Moments, slot: Slot) -> Moments:
    chosen = slice(slot.start, slot.end)
    return Moments(moments.mean[None, chosen], moments.var[None, chosen])
