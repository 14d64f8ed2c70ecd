"""The conversion rule for all of normkit's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkit.convert.adapters import adapters_of, base_of
from normkit.convert.rules import rule
from normkit.convert.source import Source, Statistics
from normkit.convert.target import AFFINE, is_over_batch, pools_examples
from normkit.layers.base import BUFFERS, NormLayer, TrackingLayer
from normkit.layers.parts import Slot
from normkit.spec import METHODS, Recipe, Value


@rule(NormLayer)
def own(layer: NormLayer) -> Source:
    """Read one of normkit's layers, or one that ``register_norm`` has named.

    A layer of the same class takes over everything, except tensors whose shape depends on the
    spec's number, such as the number of groups.
    """
    recipe = next(r for r in METHODS.values() if r.layer is base_of(layer))
    activation, channels_last = adapters_of(layer)
    slots = layer.affine_slots()
    weight, bias = (_joined([getattr(s.layer, name) for s in slots]) for name in AFFINE)
    return Source(
        num_features=layer.num_features,
        options=_options(layer, recipe),
        weight=weight,
        bias=bias,
        statistics=_statistics(layer),
        over_batch=is_over_batch(recipe),
        buffers_are_frozen=any(map(_has_frozen_buffers, layer.modules())),
        equivalent_spec=_equivalent_spec(layer),
        activation=activation,
        channels_last=channels_last,
        process_group=getattr(layer, "process_group", None) if pools_examples(layer) else None,
        lost=_lost(layer, slots),
    )


def _options(layer: NormLayer, recipe: Recipe) -> dict[str, Value]:
    """Return the constructor's options; whether statistics are tracked is read from the buffers."""
    found = {o: layer.option(o) for o in recipe.options() if o != recipe.argument}
    if "track_running_stats" in found:
        found["track_running_stats"] = getattr(layer, BUFFERS[0]) is not None
    return found | {"affine": any(True for _ in layer.parameters())}


def _has_frozen_buffers(layer: nn.Module) -> bool:
    tracks = isinstance(layer, TrackingLayer) and layer.running_mean is not None
    return tracks and not layer.track_running_stats


def _equivalent_spec(layer: NormLayer) -> str:
    name = next(name for name, recipe in METHODS.items() if recipe.layer is base_of(layer))
    argument = METHODS[name].argument
    return name if argument is None else f"{name}:{getattr(layer, argument)}"


def _joined(values: list[torch.nn.Parameter | None]) -> Tensor | None:
    """Concatenate the parameters of a layer's parts; a single one is returned as it is."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    learns = any(value.requires_grad for value in found)
    return torch.nn.Parameter(torch.cat([value.detach() for value in found]), learns)


def _statistics(layer: NormLayer) -> Statistics | None:
    """Return the running statistics if there is one value for each channel."""
    slots = layer.statistics_slots()
    if sum(end - start for _, start, end in slots) != layer.num_features:
        return None
    found = slots[0].layer
    mean, var = (found.get_buffer(name) for name in BUFFERS)
    return Statistics(mean, var, found.get_buffer("num_batches_tracked"))


def _lost(layer: NormLayer, slots: tuple[Slot, ...]) -> tuple[str, ...]:
    """Name the parameters that only this class has, and statistics that are not per channel."""
    read = [getattr(slot.layer, name) for slot in slots for name in AFFINE]
    named = dict(layer.named_parameters())
    other = [n for n, p in named.items() if not any(p is value for value in read)]
    tracks = any(name.endswith(BUFFERS[0]) for name, _ in layer.named_buffers())
    unread = ["running statistics"] if tracks and _statistics(layer) is None else []
    return tuple(other + unread)
