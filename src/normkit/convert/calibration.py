r"""Calibrating new norms on data, so that their outputs have the old norms' mean and variance.

Let :math:`(m, s^2)` be the mean and variance of a channel of the old layer's output, and
:math:`(\mu, \sigma^2)` those of the new layer's output before scale and shift. Then

.. math::  \gamma = \pm s / \sigma, \quad \beta = m - \gamma \mu

where :math:`\gamma` keeps the sign that it had. Layers are calibrated in the order of the forward,
because the inputs of each depend on the layers before it. The running statistics of a layer are
measured first, because the layers before it have changed its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from normkit.convert.adapters import adapters_of
from normkit.convert.agreement import Calibration, Outputs, agreement, tensors_of
from normkit.convert.plan import Replacement
from normkit.convert.report import Change
from normkit.convert.selection import find_norms
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
    arguments_of,
    as_list,
    device_of,
    first_calls,
    forward_batch,
    inputs_of,
    moved,
    progress,
    untouched,
)


def calibration_example(model: nn.Module, batches: Iterable[Any] | None) -> Any:
    """Return the arguments of the first batch, with which a model can be traced.

    Returns:
        A tuple or a dict of arguments; None if there are no batches in a list, or the first one has
        a form that ``forward_batch`` does not know. An iterator is not read.
    """
    if not isinstance(batches, Sequence) or not batches:
        return None
    try:
        args, named = arguments_of(model, batches[0])
    except DataError:
        return None
    return moved(named or args, device_of(model))


class Calibrator:
    """Measures the outputs of the old layers, and later sets scale and shift of the new ones.

    Args:
        model: The model before the conversion; it is not changed.
        replacements: The old layers and the new ones.
        batches: Read once into a list.
        forward: Sends a batch through the model; None is ``forward_batch``.

    Raises:
        DataError: If there is no batch, a batch needs ``forward``, the model is on the meta device,
            no batch reaches a norm, or an output of a norm is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        replacements: Sequence[Replacement],
        batches: Iterable[Any],
        forward: Forward | None,
    ) -> None:
        self._replacements: dict[nn.Module, Replacement] = {each.new: each for each in replacements}
        if any(parameter.is_meta for parameter in model.parameters()):
            raise DataError(
                "the model is on the meta device and has no values to calibrate; load its weights "
                "first, or leave calibrate= out"
            )
        self._batches = as_list(batches)
        self._forward = forward or forward_batch
        self._targets = {new: Population() for new in self._replacements}
        with ExitStack() as stack:
            for new, replacement in self._replacements.items():
                stack.callback(_watch(replacement, self._targets[new]))
            self._before = self._outputs(model, "measuring the original")
        if self._replacements and not any(target.count for target in self._targets.values()):
            raise DataError(
                f"no value of the calibrate= batches has reached any of the "
                f"{len(self._replacements)} norms; pass batches that are not empty and that the "
                f"forward sends through these layers"
            )
        for new, replacement in self._replacements.items():
            _require_finite(self._targets[new], replacement, "original")
        self._again = self._outputs(model, "measuring the original again")

    def run(self, model: nn.Module) -> Calibration:
        """Calibrate all new layers of the converted model, in the order of the forward."""
        plain = self._outputs(model, "measuring the plain swap")
        with untouched(model, training=False):
            calls = first_calls(model, self._replacements, self._batches[0], self._forward)
        skipped = [
            (r.change.name, "not called") for n, r in self._replacements.items() if n not in calls
        ]
        for new, num_calls in progress(calls.items(), "calibrating norms", len(calls)):
            replacement = self._replacements[new]
            layer = cast(NormLayer, replacement.new)  # only norms of specs are calibrated
            reason = self._calibrate(_LayerInModel(model, layer, num_calls))
            skipped += [(replacement.change.name, reason)] if reason else []
        calibrated = self._outputs(model, "measuring the calibrated model")
        return Calibration(
            num_batches=len(self._batches),
            num_layers=len(self._replacements) - len(skipped),
            skipped=tuple(skipped),
            original=agreement(self._again, self._before),
            plain=agreement(plain, self._before),
            calibrated=agreement(calibrated, self._before),
        )

    def _outputs(self, model: nn.Module, what: str) -> Outputs:
        device = device_of(model)
        with untouched(model, training=False), torch.no_grad():
            return [
                tensors_of(self._forward(model, moved(batch, device)))
                for batch in progress(self._batches, what)
            ]

    def _calibrate(self, place: _LayerInModel) -> str:
        """Calibrate one layer; return the reason if that is not possible, else an empty string."""
        new, target = place.layer, self._targets[place.layer]
        if target.count == 0:
            return "the old layer was not called"
        for layer in new.modules():
            if isinstance(layer, TrackingLayer) and layer.running_mean is not None:
                self._measure_running_statistics(place, layer)
        slots = new.last_affine_slots()
        if any(slot.layer.weight is None for slot in slots):
            return "it has no scale"
        old_scales = [_reset_affine(slot.layer) for slot in slots]
        found = Population()
        with untouched(place.model, training=False):
            for y in self._normalised(place):
                found.add(y)
        _require_finite(found, self._replacements[new], "converted")
        for slot, weight in zip(slots, old_scales, strict=True):
            _fit_affine(slot, weight, target.moments, found.moments)
        return ""

    def _measure_running_statistics(self, place: _LayerInModel, layer: TrackingLayer) -> None:
        population = Population(layer)
        with untouched(place.model, training=False):
            for x in self._inputs(place, layer):
                population.add(feature_map(place.layer, x))
        name = self._replacements[place.layer].change.name
        for buffer, values in values_of(name, layer, population.sums).items():
            layer.get_buffer(buffer).copy_(values)

    def _normalised(self, place: _LayerInModel) -> Iterator[Tensor]:
        """Iterate over the layer's outputs before its activation, with the channels on axis 1."""
        new = place.layer
        activation, _ = adapters_of(new)
        outputs = self._inputs(place, new if activation is None else activation.drop)
        for values in outputs:
            with torch.no_grad():
                y = new(values) if activation is None else values
            yield feature_map(new, y)

    def _inputs(self, place: _LayerInModel, layer: nn.Module) -> Iterator[Tensor]:
        return inputs_of(place.model, layer, self._batches, place.num_calls, self._forward)


def calibrate_like_(
    model: nn.Module, original: nn.Module, names: Iterable[str], batches: Iterable[Any]
) -> Calibration:
    """Calibrate norms of a model on the outputs of norms of the same names in another one.

    Args:
        model: Was ``original`` before its norms, and perhaps its weights, were changed.
        original: Is not changed.
        names: Norms of the model; those that ``original`` does not have stay as they are.
        batches: As in ``Calibrator``.

    Raises:
        DataError: As ``Calibrator`` does.
    """
    olds = {name: norm for norm, found in find_norms(original).items() for name in found}
    replacements = [
        Replacement(olds[name], new, Change(name=name, old=type(olds[name]).__name__, new=str(new)))
        for name, new in ((name, model.get_submodule(name)) for name in names if name in olds)
    ]
    return Calibrator(original, replacements, batches, None).run(model)


class _LayerInModel(NamedTuple):
    """A new layer, the model that contains it, and how often a forward calls it."""

    model: nn.Module
    layer: NormLayer
    num_calls: int


def _require_finite(population: Population, replacement: Replacement, which: str) -> None:
    """Refuse outputs of a norm that are NaN or infinite.

    Raises:
        DataError: If there are any; the error names the layer.
    """
    mean, squares = population.sums[2:]
    if not (mean.isfinite().all() and squares.isfinite().all()):
        raise DataError(
            f"on these batches {replacement.change.name or 'the norm'} of the {which} model "
            f"outputs NaN or infinity; check the batches and, with 16-bit dtypes, the range of the "
            f"values"
        )


def _watch(replacement: Replacement, population: Population) -> Any:
    """Add the old layer's outputs, before its activation, to a population; return the undo."""
    activation, _ = adapters_of(replacement.new)

    def see_input(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        population.add(feature_map(replacement.new, args[0]))

    def see_output(_module: nn.Module, _args: Any, output: Tensor) -> None:
        population.add(feature_map(replacement.new, output))

    if activation is None:
        return replacement.old.register_forward_hook(see_output, prepend=True).remove
    inside = any(module is activation.drop for module in replacement.old.children())
    after = activation.drop if inside else activation.act
    return after.register_forward_pre_hook(see_input, prepend=True).remove


@torch.no_grad()
def _reset_affine(layer: NormLayer) -> Tensor:
    """Set the scale to 1 and the shift, if there is one, to 0; return the old scale."""
    weight = layer.get_parameter("weight").detach().clone()
    layer.get_parameter("weight").fill_(1)
    if layer.bias is not None:
        layer.bias.fill_(0)
    return weight


@torch.no_grad()
def _fit_affine(slot: Slot, old_scale: Tensor, target: Moments, found: Moments) -> None:
    """Set the scale and shift that turn the moments ``found`` into the moments ``target``."""
    runs = Partition(num_groups=old_scale.numel())
    wanted, given = (runs.pool(_part(moments, slot)) for moments in (target, found))
    sign = torch.where(old_scale < 0, -1.0, 1.0).double()
    solved = sign * (wanted.var[0] / given.var[0]).sqrt()
    # A constant output has no variance that could be scaled, so the old scale stays.
    weight = torch.where(given.var[0] > 0, solved, old_scale.double())
    slot.layer.get_parameter("weight").copy_(weight)
    if slot.layer.bias is not None:
        slot.layer.bias.copy_(wanted.mean[0] - weight * given.mean[0])


def _part(moments: Moments, slot: Slot) -> Moments:
    chosen = slice(slot.start, slot.end)
    return Moments(moments.mean[None, chosen], moments.var[None, chosen])
