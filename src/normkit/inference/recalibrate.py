"""Exact population statistics of a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from normkit.core.check import require_count
from normkit.errors import DataError, OptionError
from normkit.inference.freeze import is_frozen
from normkit.inference.known import looks_at_mode, own_forward, takes_input_as_it_is
from normkit.inference.measure import (
    Layers,
    Measured,
    measure_at_once,
    measure_in_order,
    values_of,
)
from normkit.inference.patch import PatchedLayer, StatisticsPatch, values_now
from normkit.inference.ranks import Group
from normkit.inference.tracked import (
    Where,
    and_reasons,
    chosen,
    foreign,
    reasons,
    tracked,
    unmeasured,
    why_still,
)
from normkit.passes import Data, Forward, changes_nothing, forward_batch, unwrap


@changes_nothing
def recalibrate(  # noqa: PLR0913 - what is measured, of what, how: each is chosen by itself
    model: nn.Module,
    batches: Iterable[Any],
    *,
    where: Where | None = None,
    forward: Forward | None = None,
    sequential: bool = False,
    group: Group | None = None,
    max_batches: int | None = None,
) -> StatisticsPatch:
    """Measure the exact statistics of all inputs of every layer with running statistics.

    Batches are merged by their counts in float64, so that sizes and order do not matter to what a
    layer is given. The model is not changed: ``apply`` of the result writes the new statistics.

    In one pass, the measured layers normalise by each batch, as in training; everything else is as
    at evaluation, dropout included. The stages of micro-batch normalization, which train by their
    estimates, use those that they have. With ``sequential``, layers are measured one after the
    other in the order of the forward, each behind layers that evaluate by the statistics that were
    found for them: the model then sees at evaluation exactly what was measured, whatever the
    batches, at the price of about half a forward of everything for each layer. A layer that is
    called several times in a forward gets the inputs of all calls; with ``sequential``, those of
    later calls still follow from its old statistics.

    What counts is what reaches torch's function that normalises, not what the module is given:
    subclasses may transpose their input or select parts of it. Those of which that cannot be seen
    are left out by name.

    Frozen layers keep their statistics and normalise by them: those of ``freeze_statistics``, with
    ``momentum=0``, with ``track_running_stats`` switched off, or in evaluation mode inside a model
    in training mode.

    Args:
        model: Holds norms of torch, their subclasses, or ours; also inside
            DistributedDataParallel, or compiled.
        batches: Inputs, ``(inputs, target)`` or dicts of arguments, of any sizes; moved to the
            model's device. With ``sequential`` they are read once for every layer and once more.
        where: ``where(layer, name)`` says which layers are meant; by default all.
        forward: ``forward(model, batch)`` for batches of another form.
        sequential: Measure layer after layer.
        group: Ranks whose batches count as well; by default all, if ``torch.distributed`` is
            initialised. Each calls this; their numbers of batches may differ, and be 0.
        max_batches: Read at most so many on each rank; needed if there is no end.

    Returns:
        Old and new values of each layer with their distance; ``apply``, ``undo``, ``save``.

    Raises:
        OptionError: If there is no layer to measure, an option has a value it cannot have, or the
            model's layers cannot be looked into: it is scripted, exported, sharded or quantized.
        DataError: If there is no batch, one that needs ``forward``, an iterator for a
            ``sequential`` measurement, statistics that are not finite, or another rank has failed.
        InputError: If a batch has a single value for each statistic of a layer.
        PartitionError: If a group that a layer of ours normalises by has a single value.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        >>> patch = recalibrate(model, [torch.randn(n, 3, 8, 8) for n in (8, 8, 1)])
        >>> patch.layers[0].num_values  # 17 maps of 6x6
        612
        >>> model[1].num_batches_tracked
        tensor(0)
        >>> _ = patch.apply()
        >>> model[1].num_batches_tracked
        tensor(3)
    """
    if max_batches is not None:
        max_batches = require_count("max_batches", max_batches)
    if sequential and isinstance(batches, Iterator):
        raise DataError(
            f"a {type(batches).__name__} was given, which gives its batches once; sequential=True "
            f"reads them for every layer: pass a DataLoader, or list(batches)"
        )
    model = unwrap(model, "recalibrate")
    layers, left = _meant(model, where)
    data = Data(
        batches=batches,
        forward=forward or forward_batch,
        max_batches=max_batches,
        group=group,
    )
    measured = (measure_in_order if sequential else measure_at_once)(model, layers, data)
    _require_values(measured, layers, left)
    rows = [_row(name, layer, measured) for name, layer in layers.items() if name in measured.sums]
    missed = {n: _why_missed(n, measured) for n in layers if n not in measured.sums}
    return StatisticsPatch(
        model=model,
        layers=tuple(rows),
        left=unmeasured(model, left | missed),
        num_batches=measured.num_batches,
        max_batches=max_batches,
        sequential=sequential,
    )


def _meant(model: nn.Module, where: Where | None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers to measure, and why the others are left.

    Raises:
        OptionError: If there is none to measure.
    """
    every = tracked(model)
    left = foreign(model) | {n: why for n, layer in every.items() if (why := _why_unknown(layer))}
    found = {name: layer for name, layer in every.items() if name not in left}
    if not found:
        also = f" that can be measured{and_reasons(left)}" if left else ""
        raise OptionError(f"{type(model).__name__} has no layer with running statistics{also}")
    picked = chosen(found, where)
    left |= {name: "where= leaves it out" for name in found if name not in picked}
    frozen = {name: why for name, layer in picked.items() if (why := _why_frozen(layer, model))}
    layers = {name: layer for name, layer in picked.items() if name not in frozen}
    if not layers:
        raise OptionError(f"there is no layer to measure: {reasons(frozen)}")
    return layers, left | frozen


def _why_unknown(layer: nn.Module) -> str:
    """Why nobody can tell what a layer normalises in training; empty if that can be seen."""
    if takes_input_as_it_is(layer) or not looks_at_mode(layer):
        return ""
    return f"{own_forward(layer)}, which may normalise something else in training"


def _why_frozen(layer: nn.Module, model: nn.Module) -> str:
    if is_frozen(layer):
        return "it is frozen; nk.thaw_statistics lets it move"
    if getattr(layer, "momentum", None) == 0:
        return "its momentum is 0, so it is frozen"
    if model.training and not layer.training:
        return "it is in evaluation mode inside a model in training mode, so it is frozen"
    return why_still(layer)


def _why_missed(name: str, measured: Measured) -> str:
    return measured.missed.get(name, "no batch has reached it")


def _require_values(measured: Measured, layers: Layers, left: Mapping[str, str]) -> None:
    if measured.num_batches == 0:
        raise DataError("batches= gave no batch; an iterator that was used up has to be made anew")
    if not measured.sums:
        unseen = {name: measured.missed[name] for name in layers if name in measured.missed}
        raise DataError(
            f"{measured.num_batches} batches have brought no value to any of the {len(layers)} "
            f"layers; they are empty, can be read only once, or go past these layers"
            f"{and_reasons(unseen | dict(left))}"
        )


def _row(name: str, layer: nn.Module, measured: Measured) -> PatchedLayer:
    sums = measured.sums[name]
    eps: Any = layer.eps
    return PatchedLayer(
        name=name,
        kind=type(layer).__name__,
        eps=float(eps),
        num_values=sums.num_values,
        old=values_now(layer),
        new=values_of(name, layer, sums),
    )
