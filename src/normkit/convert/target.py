"""Building a new layer, and transferring the old layer's state to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normkit.convert.adapters import adapt_, base_of
from normkit.convert.extras import carry_extras, is_compiled
from normkit.convert.source import Source
from normkit.layers.base import BUFFERS, NormLayer, TrackingLayer
from normkit.layers.parts import Slot
from normkit.spec import METHODS, NormSpec, Recipe, Value

AFFINE = ("weight", "bias")
OVER_PROCESSES = "statistics over all processes"
STATISTICS_OPTIONS = ("momentum", "track_running_stats", "example_weight")
"""Options that are carried over only if both layers take batch statistics, or neither does."""

MIN_SAFE_EPS = 1e-12
"""Smallest ``eps`` that is safe for a group without variance.

Below it, dividing by the standard deviation multiplies rounding errors by more than 1e6, and with 0
the result is NaN.
"""


class Transfer(NamedTuple):
    """What the new layer took over and what it did not, in words."""

    carried: tuple[str, ...]
    lost: tuple[str, ...]


class NewLayer(NamedTuple):
    """A new layer, and which of the old layer's options it took over or not, in words."""

    layer: NormLayer
    carried: tuple[str, ...]
    lost: tuple[str, ...]


def build_layer(spec: NormSpec, source: Source, like: Tensor | None) -> NewLayer:
    """Build the new layer with the old layer's options, except those that the spec sets.

    Reported as carried are options that differ from the new layer's defaults. Reported as lost are
    options that would make the new layer useless and are therefore not used: an ``eps`` near 0 if
    the new layer takes other statistics, and a momentum of 0 if its running statistics would then
    never be updated.

    Args:
        spec: The resolved spec of the new layer.
        source: The old layer.
        like: The new layer gets the device and dtype of this tensor.
    """
    recipe = METHODS[spec.name]
    given = {key or str(recipe.argument): value for key, value in spec.arguments}
    known = recipe.options()
    place = {} if like is None else {"device": like.device, "dtype": _dtype(like)}
    options = _options(spec, source, given)

    def make() -> NormLayer:
        return cast(NormLayer, recipe.layer(source.num_features, **options, **given, **place))

    layer, lost = make(), []
    for option in [o for o in options if _breaks(o, options[o], spec, source, layer)]:
        lost.append(f"{option}={options.pop(option)}")
        layer = make()
    if pools_examples(layer):
        # The attribute exists on tracking layers and on composites.
        cast(TrackingLayer, layer).process_group = source.process_group
    carried = tuple(f"{o}={value}" for o, value in options.items() if value != known[o].default)
    return NewLayer(adapt_(layer, source.activation, source.channels_last), carried, tuple(lost))


def _options(spec: NormSpec, source: Source, given: Mapping[str, Value]) -> dict[str, Value]:
    """Select the old layer's options that the new layer has too, with the same meaning."""
    recipe = METHODS[spec.name]
    other = () if is_over_batch(recipe) == source.over_batch else STATISTICS_OPTIONS
    return {
        option: value
        for option, value in source.options.items()
        if option in recipe.options() and option not in given and option not in other
    }


def _breaks(option: str, value: Value, spec: NormSpec, source: Source, layer: NormLayer) -> bool:
    """Whether an option that was right for the old layer would make the new one useless."""
    if option == "eps":
        return float(cast(float, value)) < MIN_SAFE_EPS and str(spec) != source.equivalent_spec
    continues = source.statistics is not None and layer.statistics_slots()
    return option == "momentum" and value == 0 and not continues


def pools_examples(layer: nn.Module) -> bool:
    """Whether a layer, in training, uses or tracks statistics of several examples."""
    if any(isinstance(m, TrackingLayer) and m.running_mean is not None for m in layer.modules()):
        return True
    return isinstance(layer, NormLayer) and any(
        p.examples_per_group != 1 for p in layer.partitions.values()
    )


def is_over_batch(recipe: Recipe) -> bool:
    """Whether a layer's statistics are taken over the batch in training."""
    weight = recipe.options().get("example_weight")
    return weight is not None and weight.default == 0


def transfer_state(new: NormLayer, old: nn.Module, source: Source, mode: bool) -> Transfer:
    """Transfer parameters, statistics, flags, hooks and added attributes to the new layer.

    Args:
        new: The new layer, from ``build_layer``.
        old: The old layer, of any library; it is not changed.
        source: What the old layer's rule has read from it.
        mode: Value of ``training`` for the new layer.

    Raises:
        ConversionError: If something that was added to the old layer cannot be transferred.
    """
    carried = [name for name in AFFINE if _transfer_affine(new, name, getattr(source, name))]
    if _transfer_statistics(new, source):
        carried.append("running statistics")
        carried += ["track_running_stats=False"] if source.buffers_are_frozen else []
    if source.process_group is not None and pools_examples(new):
        carried.append(OVER_PROCESSES)
    same = _transfer_matching(new, old) if base_of(new) is base_of(old) else []
    carried += [name for name in same if name not in carried]
    carried += source.activation.described() if source.activation else ()
    _transfer_requires_grad(new, old, source)
    carried += carry_extras(new, old, source.values)
    shared = set(old.modules())
    for module in new.modules():
        if module not in shared:
            module.training = mode
    had = [name for name in AFFINE if getattr(source, name) is not None]
    had += ["compile()"] if is_compiled(old) else []
    had += ["running statistics"] if source.statistics else []
    had += [] if source.process_group is None else [OVER_PROCESSES]
    had += [name for name in source.lost if name not in had]
    return Transfer(tuple(carried), tuple(name for name in had if name not in carried))


def _transfer_affine(new: NormLayer, name: str, value: Tensor | None) -> bool:
    """Set the new layer's weight or bias; return whether it has one and the old layer too."""
    slots = new.affine_slots()
    if value is None or any(getattr(slot.layer, name) is None for slot in slots):
        return False
    for slot in slots:
        setattr(slot.layer, name, _part(value, slot))
    return True


def _part(value: Tensor, slot: Slot) -> nn.Parameter:
    """Return the same parameter object if all of it fits the slot, else a copy of its part."""
    if isinstance(value, nn.Parameter) and slot.end - slot.start == value.numel():
        return value
    part = value.detach()[slot.start : slot.end].clone()
    new = nn.Parameter(part, isinstance(value, nn.Parameter) and value.requires_grad)
    vars(new).update(vars(value))
    return new


@torch.no_grad()
def _transfer_statistics(new: NormLayer, source: Source) -> bool:
    slots = new.statistics_slots()
    if source.statistics is None or not slots:
        return False
    mean, var, count = source.statistics
    for layer, start, end in slots:
        for name, values in zip(BUFFERS, (mean, var), strict=True):
            layer.get_buffer(name).copy_(values[start:end])
        if count is not None:
            layer.get_buffer("num_batches_tracked").copy_(count)
        cast(TrackingLayer, layer).track_running_stats = not source.buffers_are_frozen
    return True


@torch.no_grad()
def _transfer_matching(new: NormLayer, old: nn.Module) -> list[str]:
    """Transfer all tensors with the same name and shape from a layer of the same class."""
    parameters, buffers = dict(new.named_parameters()), dict(new.named_buffers())
    transferred = []
    for name, value in old.named_parameters():
        if name in parameters and parameters[name].shape == value.shape:
            holder, _, own = name.rpartition(".")
            setattr(new.get_submodule(holder), own, value)
            transferred.append(name)
    for name, value in old.named_buffers():
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
            transferred.append("running statistics")
    return list(dict.fromkeys(transferred))


def _transfer_requires_grad(new: NormLayer, old: nn.Module, source: Source) -> None:
    """Freeze the new parameters if no parameter of the old layer required a gradient."""
    before = list(old.parameters())
    learns = any(p.requires_grad for p in before) if before else not source.fixed
    if not learns:
        for parameter in new.parameters():
            if not any(parameter is p for p in before):
                parameter.requires_grad_(False)


def _dtype(like: Tensor) -> torch.dtype | None:
    return like.dtype if like.is_floating_point() else None


def describe(module: nn.Module) -> str:
    """Describe a layer by its class and, if known, number of channels: ``BatchNorm2d(64)``."""
    names = ("num_features", "num_channels", "normalized_shape")
    weight = getattr(module, "weight", None)
    sizes = [getattr(module, name, None) for name in names]
    sizes.append(weight.numel() if isinstance(weight, Tensor) and not is_lazy(weight) else None)
    size = next((size for size in sizes if size is not None), "")
    shown = size[0] if isinstance(size, tuple) and len(size) == 1 else size
    return f"{type(module).__name__}({shown})"
