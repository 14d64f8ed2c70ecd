"""Exact population statistics of a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from normkit.core.check import require_count
from normkit.errors import DataError, OptionError
from normkit.inference.freeze import is_frozen
from normkit.inference.measure import (
    Layers,
    Measured,
    measure_in_one_pass,
    measure_in_order,
    values_of,
)
from normkit.inference.norm_classes import (
    describe_own_forward,
    may_depend_on_mode,
    normalizes_its_input,
)
from normkit.inference.patch import PatchedLayer, StatisticsPatch, copy_statistics
from normkit.inference.ranks import Group
from normkit.inference.tracked import (
    Where,
    and_reasons,
    reasons,
    select_layers,
    tracked,
    unknown_layers,
    unmeasured,
    why_not_updated,
)
from normkit.passes import Data, Forward, changes_nothing, forward_batch, unwrap


@changes_nothing
def recalibrate(  # noqa: PLR0913 - model, data and method have independent options
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

    Batches are merged in float64 and weighted by their counts, so that the result does not depend
    on their sizes and order. The model is not changed; call ``apply`` of the result to write the
    new statistics.

    By default one pass measures all layers. In it the measured layers normalise by each batch, as
    in training, and everything else, such as dropout, runs as at evaluation. Micro-batch norms,
    which use their estimates in training, use them here as well.

    With ``sequential`` the layers are measured one after the other, in the order of the forward,
    and earlier layers already evaluate by their new statistics. The new statistics are then
    exactly those of the layers' inputs at evaluation, whatever the batches. This costs about half a
    forward of all batches for each layer. A layer that is called several times in a forward gets
    the inputs of all its calls; with ``sequential``, inputs of later calls still depend on its old
    statistics.

    The input that counts is the tensor that reaches the function that normalises, not the module's
    input: subclasses may transpose their input or select parts of it. Layers whose input cannot be
    seen are left out, and the result names them.

    Frozen layers keep their statistics and normalise by them. A layer is frozen by
    ``freeze_statistics``, by ``momentum=0``, by ``track_running_stats`` switched off, or by
    evaluation mode inside a model in training mode.

    Args:
        model: Holds norms of torch, their subclasses, or norms of normkit; it may be inside
            DistributedDataParallel, or compiled.
        batches: Inputs, pairs ``(inputs, target)`` or dicts of arguments, of any sizes; moved to
            the model's device. With ``sequential`` they are read once for each layer and once more.
        where: ``where(layer, name)`` chooses the layers to measure; by default all.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.
        sequential: Measure one layer after the other.
        group: The ranks whose batches count, including this one; by default all, if
            ``torch.distributed`` is initialised. Each must call this function; their numbers of
            batches may differ, and may be 0.
        max_batches: Read at most so many batches on each rank; needed for endless data.

    Returns:
        Old and new values of each layer with their distance; ``apply``, ``undo``, ``save``.

    Raises:
        OptionError: If there is no layer to measure, an option has an invalid value, or the
            model's layers are not accessible, because it is scripted, exported, sharded or
            quantized.
        DataError: If there is no batch, a batch needs ``forward``, ``batches`` is an iterator
            although ``sequential`` reads it several times, statistics are not finite, or another
            rank has failed.
        InputError: If a batch has a single value for each statistic of a layer.
        PartitionError: If a group by which a layer of normkit normalises has a single value.

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
            f"a {type(batches).__name__} was given, which yields its batches only once; "
            f"sequential=True reads them for every layer: pass a DataLoader, or list(batches)"
        )
    model = unwrap(model, "recalibrate")
    layers, left = _layers_to_measure(model, where)
    data = Data(
        batches=batches,
        forward=forward or forward_batch,
        max_batches=max_batches,
        group=group,
    )
    measured = (measure_in_order if sequential else measure_in_one_pass)(model, layers, data)
    _require_values(measured, layers, left)
    rows = [_row(name, layer, measured) for name, layer in layers.items() if name in measured.sums]
    missed = {
        name: measured.missed.get(name, "no batch has reached it")
        for name in layers
        if name not in measured.sums
    }
    return StatisticsPatch(
        model=model,
        layers=tuple(rows),
        left=unmeasured(model, left | missed),
        num_batches=measured.num_batches,
        max_batches=max_batches,
        sequential=sequential,
    )


def _layers_to_measure(
    model: nn.Module, where: Where | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Choose the layers to measure, and say why the others are left out.

    Raises:
        OptionError: If there is no layer to measure.
    """
    every = tracked(model)
    left = unknown_layers(model) | {
        n: why for n, layer in every.items() if (why := _why_unknown(layer))
    }
    found = {name: layer for name, layer in every.items() if name not in left}
    if not found:
        also = f" that can be measured{and_reasons(left)}" if left else ""
        raise OptionError(f"{type(model).__name__} has no layer with running statistics{also}")
    picked = select_layers(found, where)
    left |= {name: "where= leaves it out" for name in found if name not in picked}
    frozen = {name: why for name, layer in picked.items() if (why := _why_frozen(layer, model))}
    layers = {name: layer for name, layer in picked.items() if name not in frozen}
    if not layers:
        raise OptionError(f"there is no layer to measure: {reasons(frozen)}")
    return layers, left | frozen


def _why_unknown(layer: nn.Module) -> str:
    """Why it is unknown what a layer normalises in training; empty if it is known."""
    if normalizes_its_input(layer) or not may_depend_on_mode(layer):
        return ""
    return f"{describe_own_forward(layer)}, which may normalise something else in training"


def _why_frozen(layer: nn.Module, model: nn.Module) -> str:
    if is_frozen(layer):
        return "it is frozen; nk.thaw_statistics thaws it"
    if getattr(layer, "momentum", None) == 0:
        return "its momentum is 0, so it is frozen"
    if model.training and not layer.training:
        return "it is in evaluation mode inside a model in training mode, so it is frozen"
    return why_not_updated(layer)


def _require_values(measured: Measured, layers: Layers, left: Mapping[str, str]) -> None:
    if measured.num_batches == 0:
        raise DataError("batches= gave no batch; an iterator that was used up must be made anew")
    if not measured.sums:
        unseen = {name: measured.missed[name] for name in layers if name in measured.missed}
        raise DataError(
            f"{measured.num_batches} batches have brought no value to any of the {len(layers)} "
            f"layers; the batches are empty, can be read only once, or do not reach these layers"
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
        old=copy_statistics(layer),
        new=values_of(name, layer, sums),
    )
