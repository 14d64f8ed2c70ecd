"""Planning the way from normkit's layers to torch's classes that compute the same."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from normkit.convert.adapters import adapters_of, base_of
from normkit.convert.extras import carry_extras
from normkit.convert.forward_reads import find_reads, require_readable
from normkit.convert.own_layers import own
from normkit.convert.plan import ConversionPlan, Replacement, left_row
from normkit.convert.report import Change
from normkit.convert.rules import require_unmodified
from normkit.convert.selection import NamedNorms, find_norms
from normkit.convert.source import Source
from normkit.convert.target import AFFINE, describe
from normkit.errors import OptionError, TraceError
from normkit.inference.freeze import is_frozen
from normkit.layers import over_batch, over_example
from normkit.layers.base import BUFFERS, NormLayer, TrackingLayer
from normkit.passes import call_with, copied, untouched
from normkit.text import by_reason, module_name

NUM_AXES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
WHICH_RANK = (
    "torch has a class for each number of spatial axes, and nothing says how many its input has: "
    "pass example_input="
)


class _NotInTorchError(Exception):
    """Torch has no layer that computes the same; why."""


class _Layer(NamedTuple):
    """One of normkit's layers: itself, what its rule reads, and the spatial axes of its input."""

    layer: NormLayer
    source: Source
    num_axes: int | None


@torch.inference_mode(False)  # parameters created in inference mode could not be trained
def plan_to_torch(
    model: nn.Module,
    where: Callable[[nn.Module, str], bool] | None,
    olds: Mapping[nn.Module, nn.Module],
    example_input: Any,
) -> ConversionPlan:
    """Build torch's layers for those of normkit's that torch has too.

    Args:
        model: The model; it is not changed.
        where: ``where(module, name)`` returns whether to replace a norm.
        olds: For normkit's layers, the layers in whose place they came, as far as known.
        example_input: Tells the number of spatial axes.

    Raises:
        OptionError: If there is none that can be replaced; the error says why of each.
        ConversionError: If something that was added to a layer cannot be transferred.
    """
    found = find_norms(model)
    chosen = [n for n in found if isinstance(n, NormLayer) and (not where or where(n, found[n][0]))]
    if not chosen:
        raise OptionError(
            f"{type(model).__name__} has no layer of normkit"
            + (" that where= chooses" if where else "")
            + ", so there is nothing to bring back to torch"
        )
    num_axes = _num_axes(model, chosen, olds, example_input)
    reads = find_reads(model)
    replacements, why_not = [], {}
    for layer in chosen:
        try:
            new = _built(layer, num_axes.get(layer))
        except _NotInTorchError as reason:
            why_not[layer] = str(reason)
            continue
        require_readable(layer, new.new, reads.get(layer, {}))
        replacements.append(_with_name(new, found))
    if not replacements:
        raise OptionError(_none(why_not, found))
    left = [left_row(found[layer][0], layer, why) for layer, why in why_not.items()]
    return ConversionPlan(tuple(replacements), tuple(left))


def _none(why_not: Mapping[nn.Module, str], found: NamedNorms) -> str:
    reasons = by_reason((module_name(found[layer][0]), why) for layer, why in why_not.items())
    lines = [f"  {names}: {why}" for why, names in reasons.items()]
    return "\n".join(["no layer can become one of torch's", *lines])


def _with_name(new: Replacement, found: NamedNorms) -> Replacement:
    change = Change(
        name=found[new.old][0],
        old=new.change.old,
        new=new.change.new,
        carried=new.change.carried,
        lost=new.change.lost,
    )
    return Replacement(new.old, new.new, change)


def _num_axes(
    model: nn.Module,
    layers: Iterable[nn.Module],
    olds: Mapping[nn.Module, nn.Module],
    example_input: Any,
) -> dict[nn.Module, int]:
    """Count the spatial axes of inputs: by a forward, else by the classes that were there before.

    Raises:
        TraceError: If the model does not accept the example input.
    """
    named = {n: re.search(r"([123])d", type(olds[n]).__name__) for n in layers if n in olds}
    found = {norm: int(match[1]) for norm, match in named.items() if match}
    if example_input is None:
        return found

    def see(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[norm] = args[0].dim() - 2

    with untouched(model, training=False), torch.no_grad():
        for norm in layers:
            norm.register_forward_pre_hook(see)
        try:
            call_with(model, copied(example_input))
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} does not accept the example input: {error}"
            ) from error
    return found


def _built(layer: NormLayer, num_axes: int | None) -> Replacement:
    """Build the layer, with everything that the old one holds.

    Raises:
        _NotInTorchError: If torch has none.
        ConversionError: If something that was added to the layer cannot be transferred.
    """
    if any(map(is_frozen, layer.modules())):
        raise _NotInTorchError("its statistics are frozen, and torch's would not be")
    make = _MAKERS.get(base_of(layer))
    if make is None:
        raise _NotInTorchError("torch has no such layer")
    _require_plain(layer, make is _layer_norm)
    require_unmodified(layer)
    source = own(layer)
    new = make(_Layer(layer, source, num_axes))
    for name in AFFINE:
        setattr(new, name, getattr(source, name))
    lost = _transfer_statistics(new, layer)
    extras = carry_extras(new, layer, source.values)
    new.training = layer.training
    carried = [name for name in AFFINE if getattr(new, name) is not None]
    carried += ["running statistics"] if new._buffers else []
    change = Change(
        name="",
        old=describe(layer),
        new=f"nn.{describe(new)}",
        carried=(*carried, *extras),
        lost=lost,
    )
    return Replacement(layer, new, change)


def _require_plain(layer: NormLayer, takes_channels_last: bool) -> None:
    """Require that the layer only normalises, scales and shifts.

    Raises:
        _NotInTorchError: If it does more.
    """
    activation, is_channels_last = adapters_of(layer)
    after = [] if layer.activation is None else [layer.activation]
    after += activation.described() if activation is not None else []
    if after:
        raise _NotInTorchError(f"it goes on to {' and '.join(after)}, which no norm of torch does")
    if is_channels_last and not takes_channels_last:
        raise _NotInTorchError(
            "it takes channels on the last axis, which this norm of torch does not"
        )


@torch.no_grad()
def _transfer_statistics(new: nn.Module, layer: NormLayer) -> tuple[str, ...]:
    """Copy the running statistics; return what is lost, in words."""
    if not isinstance(layer, TrackingLayer) or layer.running_mean is None:
        return ()
    for name in (*BUFFERS, "num_batches_tracked"):
        new.get_buffer(name).copy_(layer.get_buffer(name))
    cast(nn.BatchNorm2d, new).track_running_stats = layer.track_running_stats
    narrow = new.get_buffer(BUFFERS[0]).dtype
    is_narrower = narrow.itemsize < layer.running_mean.dtype.itemsize
    return (f"digits of the running statistics, {narrow} now",) if is_narrower else ()


def _options(made: _Layer, kind: type[nn.Module], affine: str = "affine") -> dict[str, Any]:
    """Give the constructor's options that all norms share, and the place of the old layer."""
    options = made.source.options
    held = [*made.layer.parameters(), *made.layer.buffers()]
    given: dict[str, Any] = {"eps": options["eps"], affine: made.source.weight is not None}
    if given[affine] and not options["bias"]:
        if "bias" not in inspect.signature(kind).parameters:
            raise _NotInTorchError(
                f"it has no bias, without which torch {torch.__version__} has none"
            )
        given["bias"] = False
    place = {"device": held[0].device} if held else {}
    floats = [value.dtype for value in made.layer.parameters()]
    return given | place | ({"dtype": floats[0]} if floats else {})


def _tracked(made: _Layer) -> dict[str, Any]:
    options = made.source.options
    return {
        "momentum": options["momentum"],
        "track_running_stats": options["track_running_stats"],
    }


def _batch_norm(made: _Layer) -> nn.Module:
    layer = cast(over_batch.BatchNorm, made.layer)
    if layer.example_weight:
        raise _NotInTorchError(
            f"example_weight={layer.example_weight}, which torch's does not have"
        )
    if layer.process_group is not None:
        group = None if layer.process_group == "world" else layer.process_group
        kind: type[nn.Module] = nn.SyncBatchNorm
        options = _options(made, kind) | _tracked(made)
        return kind(layer.num_features, process_group=group, **options)
    kind = NUM_AXES[_require_axes(made)]
    return kind(layer.num_features, **_options(made, kind), **_tracked(made))


def _instance_norm(made: _Layer) -> nn.Module:
    if made.source.options["track_running_stats"]:
        raise _NotInTorchError(
            "its running statistics are of whole batches, and torch's are averages of examples'"
        )
    kind = INSTANCE_NORMS[_require_axes(made)]
    return kind(made.layer.num_features, **_options(made, kind))


def _group_norm(made: _Layer) -> nn.Module:
    layer = cast(over_example.GroupNorm, made.layer)
    _require_own_statistics(made)
    groups = layer.num_groups if isinstance(layer, over_example.GroupNorm) else 1
    return nn.GroupNorm(groups, layer.num_features, **_options(made, nn.GroupNorm))


def _layer_norm(made: _Layer) -> nn.Module:
    if not adapters_of(made.layer)[1]:
        raise _NotInTorchError("torch has it for channels on the last axis alone")
    options = _options(made, nn.LayerNorm, "elementwise_affine")
    return nn.LayerNorm(made.layer.num_features, **options)


def _require_own_statistics(made: _Layer) -> None:
    if made.source.options.get("track_running_stats"):
        raise _NotInTorchError("it keeps running statistics, which torch's does not")


def _require_axes(made: _Layer) -> int:
    if made.num_axes is None:
        raise _NotInTorchError(WHICH_RANK)
    num_axes = max(1, made.num_axes)
    if num_axes not in NUM_AXES:
        raise _NotInTorchError(f"its input has {num_axes} spatial axes, and torch's at most 3")
    return num_axes


_MAKERS: dict[type[nn.Module], Callable[[_Layer], nn.Module]] = {
    over_batch.BatchNorm: _batch_norm,
    over_example.InstanceNorm: _instance_norm,
    over_example.GroupNorm: _group_norm,
    over_example.LayerNorm: _group_norm,
    over_example.PositionalNorm: _layer_norm,
}
