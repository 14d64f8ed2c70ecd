"""How our own layers are read: all by one rule."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.convert.adapters import adapters_of, base_of
from normkit.convert.rules import rule
from normkit.convert.source import Source, Statistics
from normkit.convert.target import (
    AFFINE,
    Slot,
    affine_slots,
    is_over_batch,
    pools_examples,
    statistics_slots,
)
from normkit.layers.base import BUFFERS, NormLayer
from normkit.spec import METHODS

RECIPES = {recipe.layer: recipe for recipe in METHODS.values()}


@rule(*(kind for kind in RECIPES if isinstance(kind, type)))
def own(layer: NormLayer) -> Source:
    """Everything is carried to a layer of the same class, except what its number decides."""
    recipe = RECIPES[base_of(layer)]
    activation, channels_last = adapters_of(layer)
    slots = affine_slots(layer)
    return Source(
        num_features=layer.num_features,
        options={o: layer.option(o) for o in recipe.options() if o != recipe.argument},
        weight=_joined([slot.layer.weight for slot in slots]),
        bias=_joined([slot.layer.bias for slot in slots]),
        statistics=_statistics(layer),
        over_batch=is_over_batch(recipe),
        activation=activation,
        channels_last=channels_last,
        process_group=getattr(layer, "process_group", None) if pools_examples(layer) else None,
        lost=_lost(layer, slots),
    )


def _joined(values: list[torch.nn.Parameter | None]) -> Tensor | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    learns = any(value.requires_grad for value in found)
    return torch.nn.Parameter(torch.cat([value.detach() for value in found]), learns)


def _statistics(layer: NormLayer) -> Statistics | None:
    slots = statistics_slots(layer)
    if sum(end - start for _, start, end in slots) != layer.num_features:
        return None
    found = slots[0].layer
    mean, var = (found.get_buffer(name) for name in BUFFERS)
    return Statistics(mean, var, found.get_buffer("num_batches_tracked"))


def _lost(layer: NormLayer, slots: tuple[Slot, ...]) -> tuple[str, ...]:
    """Learned values that only this class has, and statistics that are of something else."""
    read = [getattr(slot.layer, name) for slot in slots for name in AFFINE]
    named = dict(layer.named_parameters())
    other = [n for n, p in named.items() if not any(p is value for value in read)]
    tracks = any(name.endswith(BUFFERS[0]) for name, _ in layer.named_buffers())
    unread = ["running statistics"] if tracks and _statistics(layer) is None else []
    return tuple(other + unread)
