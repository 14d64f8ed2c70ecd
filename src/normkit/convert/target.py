"""How a new layer is built and takes over what the old one has."""

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
OF_STATISTICS = ("momentum", "track_running_stats", "example_weight")
"""Options that mean the same only between layers that both look at the batch, or both do not."""


LEAST_EPS = 1e-12
"""Below this, the rounding error of a constant group is multiplied by more than 1e6; 0 is NaN."""


class Taken(NamedTuple):
    """What came over and what did not, in words."""

    carried: tuple[str, ...]
    lost: tuple[str, ...]


class Built(NamedTuple):
    """A new layer, and the old one's options that it has and that it has not, in words."""

    layer: NormLayer
    carried: tuple[str, ...]
    lost: tuple[str, ...]


def built(spec: NormSpec, source: Source, like: Tensor | None) -> Built:
    """Build the new layer with the old one's options where the spec does not say otherwise.

    Carried are options that are not the new layer's defaults. Lost are those that would break it:
    an eps near 0 where it divides by other deviations than the old layer, and a momentum of 0 where
    its running statistics would stay at their first values.

    Args:
        spec: What to build, resolved.
        source: The old layer.
        like: Tensor whose device and dtype the new layer has.
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
        cast(TrackingLayer, layer).process_group = source.process_group  # or a composite's
    said = tuple(f"{o}={value}" for o, value in options.items() if value != known[o].default)
    return Built(adapt_(layer, source.activation, source.channels_last), said, tuple(lost))


def _options(spec: NormSpec, source: Source, given: Mapping[str, Value]) -> dict[str, Value]:
    """Find the old layer's options that mean the same in the new one."""
    recipe = METHODS[spec.name]
    other = () if is_over_batch(recipe) == source.over_batch else OF_STATISTICS
    return {
        option: value
        for option, value in source.options.items()
        if option in recipe.options() and option not in given and option not in other
    }


def _breaks(option: str, value: Value, spec: NormSpec, source: Source, layer: NormLayer) -> bool:
    """Whether an option that was right for the old layer would make the new one useless."""
    if option == "eps":
        return float(cast(float, value)) < LEAST_EPS and str(spec) != source.twin
    continues = source.statistics is not None and layer.statistics_slots()
    return option == "momentum" and value == 0 and not continues


def pools_examples(layer: nn.Module) -> bool:
    """Whether a layer of ours, in training, pools or keeps statistics of several examples."""
    if any(isinstance(m, TrackingLayer) and m.running_mean is not None for m in layer.modules()):
        return True
    return isinstance(layer, NormLayer) and any(
        p.examples_per_group != 1 for p in layer.partitions.values()
    )


def is_over_batch(recipe: Recipe) -> bool:
    """Whether a layer's statistics are taken over the batch in training."""
    weight = recipe.options().get("example_weight")
    return weight is not None and weight.default == 0


def take_over(new: NormLayer, old: nn.Module, source: Source, mode: bool) -> Taken:
    """Give the new layer the old one's parameters, statistics, flags, hooks and what hangs on it.

    Args:
        new: Of ours, as ``built`` has made it.
        old: Of any library, left as it is.
        source: What there is to take.
        mode: Whether the new layer trains.

    Raises:
        ConversionError: If something that hangs on the old layer cannot be carried.
    """
    carried = [name for name in AFFINE if _take_affine(new, name, getattr(source, name))]
    if _take_statistics(new, source):
        carried.append("running statistics")
        carried += ["track_running_stats=False"] if source.still else []
    if source.process_group is not None and pools_examples(new):
        carried.append(OVER_PROCESSES)
    same = _take_same(new, old) if base_of(new) is base_of(old) else []
    carried += [name for name in same if name not in carried]
    carried += source.activation.described() if source.activation else ()
    _take_requires_grad(new, old, source)
    carried += carry_extras(new, old, source.values)
    _take_mode(new, old, mode)
    had = [name for name in AFFINE if getattr(source, name) is not None]
    had += ["compile()"] if is_compiled(old) else []
    had += ["running statistics"] if source.statistics else []
    had += [] if source.process_group is None else [OVER_PROCESSES]
    had += [name for name in source.lost if name not in had]
    return Taken(tuple(carried), tuple(name for name in had if name not in carried))


def _take_affine(new: NormLayer, name: str, value: Tensor | None) -> bool:
    """Take the very parameter where it fits, else a parameter with its values."""
    slots = new.affine_slots()
    if value is None or any(getattr(slot.layer, name) is None for slot in slots):
        return False
    for slot in slots:
        setattr(slot.layer, name, _part(value, slot))
    return True


def _part(value: Tensor, slot: Slot) -> nn.Parameter:
    if isinstance(value, nn.Parameter) and slot.end - slot.start == value.numel():
        return value
    part = value.detach()[slot.start : slot.end].clone()
    new = nn.Parameter(part, isinstance(value, nn.Parameter) and value.requires_grad)
    vars(new).update(vars(value))
    return new


@torch.no_grad()
def _take_statistics(new: NormLayer, source: Source) -> bool:
    slots = new.statistics_slots()
    if source.statistics is None or not slots:
        return False
    mean, var, count = source.statistics
    for layer, start, end in slots:
        for name, values in zip(BUFFERS, (mean, var), strict=True):
            layer.get_buffer(name).copy_(values[start:end])
        if count is not None:
            layer.get_buffer("num_batches_tracked").copy_(count)
        cast(TrackingLayer, layer).track_running_stats = not source.still
    return True


@torch.no_grad()
def _take_same(new: NormLayer, old: nn.Module) -> list[str]:
    """Take everything of the same name and shape from a layer of the same class."""
    parameters, buffers = dict(new.named_parameters()), dict(new.named_buffers())
    taken = []
    for name, value in old.named_parameters():
        if name in parameters and parameters[name].shape == value.shape:
            holder, _, own = name.rpartition(".")
            setattr(new.get_submodule(holder), own, value)
            taken.append(name)
    for name, value in old.named_buffers():
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
            taken.append("running statistics")
    return list(dict.fromkeys(taken))


def _take_requires_grad(new: NormLayer, old: nn.Module, source: Source) -> None:
    """Parameters that are new learn if the old layer did."""
    before = list(old.parameters())
    learns = any(p.requires_grad for p in before) if before else not source.fixed
    if not learns:
        for parameter in new.parameters():
            if not any(parameter is p for p in before):
                parameter.requires_grad_(False)


def _take_mode(new: NormLayer, old: nn.Module, mode: bool) -> None:
    """Take the mode; what the new layer keeps of the old one has its own."""
    kept = set(old.modules())
    for module in new.modules():
        if module not in kept:
            module.training = mode


def _dtype(like: Tensor) -> torch.dtype | None:
    return like.dtype if like.is_floating_point() else None


def describe(module: nn.Module) -> str:
    """Name a layer with its number of channels, where it says so."""
    names = ("num_features", "num_channels", "normalized_shape")
    weight = getattr(module, "weight", None)
    sizes = [getattr(module, name, None) for name in names]
    sizes.append(weight.numel() if isinstance(weight, Tensor) and not is_lazy(weight) else None)
    size = next((size for size in sizes if size is not None), "")
    shown = size[0] if isinstance(size, tuple) and len(size) == 1 else size
    return f"{type(module).__name__}({shown})"
