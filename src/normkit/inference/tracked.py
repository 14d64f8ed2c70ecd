"""Find the modules with running statistics, and the buffers that hold these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normkit.core.mask import read_mask
from normkit.errors import OptionError
from normkit.layers.base import BUFFERS, NormLayer, TrackingLayer
from normkit.text import module_name

Where = Callable[[nn.Module, str], bool]
STATISTICS = (*BUFFERS, "num_batches_tracked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmeasured:
    """A layer that a measurement has left out.

    Args:
        name: Its name in the model.
        kind: The name of its class.
        why: The reason.
    """

    name: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"left out: {module_name(self.name)} ({self.kind}): {self.why}"


def unmeasured(model: nn.Module, left: Mapping[str, str]) -> tuple[Unmeasured, ...]:
    """List the layers that were left out, in the order of the model.

    Args:
        model: The model.
        left: The reasons, by layer name.
    """
    return tuple(
        Unmeasured(name=name, kind=type(module).__name__, why=left[name])
        for name, module in model.named_modules()
        if name in left
    )


def reasons(left: Mapping[str, str], at_most: int = 5) -> str:
    """List for an error why layers were left out; empty if none was."""
    shown = [f"{module_name(name)}: {why}" for name, why in list(left.items())[:at_most]]
    return "; ".join(shown) + ("; ..." if len(left) > at_most else "")


def and_reasons(left: Mapping[str, str]) -> str:
    """List the reasons for the end of a message: after a semicolon, or empty if there is none."""
    return f"; {reasons(left)}" if left else ""


def keeps_statistics(module: nn.Module) -> bool:
    """Whether this is a norm of torch or normkit, or a subclass, with running statistics."""
    return isinstance(module, _NormBase | TrackingLayer) and module.running_mean is not None


def tracked(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers with running statistics, also inside composites.

    Raises:
        OptionError: If one of them does not know its number of channels yet.
    """
    found = {name: module for name, module in model.named_modules() if keeps_statistics(module)}
    for name, layer in found.items():
        if any(map(is_lazy, statistics_of(layer).values())):
            raise OptionError(
                f"layer {name!r} ({type(layer).__name__}) does not know its number of channels "
                f"yet; send one batch through the model first"
            )
    return found


def unknown_layers(model: nn.Module) -> dict[str, str]:
    """Find modules with running statistics of other classes than torch's and normkit's.

    Returns:
        By name, the reason why such a module is left out.
    """
    return {
        name: "its class keeps its statistics fixed"
        if "Frozen" in type(module).__name__
        else "its class is no norm of torch and none of normkit"
        for name, module in model.named_modules()
        if not keeps_statistics(module) and all(module._buffers.get(b) is not None for b in BUFFERS)
    }


def select_layers(layers: Mapping[str, nn.Module], where: Where | None) -> dict[str, nn.Module]:
    """Select the layers for which ``where(layer, name)`` is true; all if ``where`` is None.

    Raises:
        OptionError: If it is true for none.
    """
    if where is None:
        return dict(layers)
    found = {name: layer for name, layer in layers.items() if where(layer, name)}
    if not found:
        names = ", ".join(name or "the model itself" for name in layers)
        raise OptionError(f"where= chooses none of the {len(layers)} layers; they are: {names}")
    return found


def callers(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """Find the module to put a hook on for each layer: the layer, or the composite around it.

    A composite does not call its parts unless one of them has a hook.

    Returns:
        Each such module with its layers.
    """
    modules = dict(model.named_modules())
    found: dict[nn.Module, list[nn.Module]] = {}
    for name, layer in layers.items():
        parts = name.split(".") if name else []
        above = (modules.get(".".join(parts[:end])) for end in range(len(parts)))
        caller = next((m for m in above if isinstance(m, NormLayer)), layer)
        found.setdefault(caller, []).append(layer)
    return found


def statistics_of(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's running statistics by name; ``num_batches_tracked`` may be missing."""
    found = {name: layer._buffers.get(name) for name in STATISTICS}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def why_not_updated(layer: nn.Module) -> str:
    """Why training does not update a layer's running statistics; empty if it does.

    If ``track_running_stats`` is switched off after building, a batch norm still evaluates by its
    buffers but does not update them, and torch's instance norms evaluate without them.
    """
    if getattr(layer, "track_running_stats", True):
        return ""
    if isinstance(layer, _InstanceNorm):
        return "its track_running_stats is off, so it normalises by its input alone"
    return "its track_running_stats is off, so it is frozen; set it to True to thaw it"


CUT = "its groups cut through positions, of which a mask leaves out some"
"""Why a layer is left out: with a mask its groups have different numbers of valid values."""


def cuts_positions(layer: nn.Module, num_channels: int) -> bool:
    """Whether a layer's groups hold only a part of a channel's positions."""
    groups = layer.running_partition.num_groups if isinstance(layer, TrackingLayer) else 1
    return num_channels % groups != 0


def valid_positions(
    norm: nn.Module,
    x: Any,
    args: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Tensor | None:
    """The positions of an input that the call's mask keeps, ``(N, 1, *S)``; None without a mask."""
    mask = args[1] if len(args) > 1 else named.get("mask")
    if mask is None or not isinstance(norm, NormLayer):
        return None
    return read_mask(mask, x, type(norm).__name__)


def feature_map(layer: nn.Module, x: Any) -> Any:
    """Return a layer's input as ``(N, C, *S)``.

    The classes of converted layers say whether they take the channels last. Torch's instance norms
    also take one example without the batch axis.
    """
    if "ChannelsLast" in getattr(layer, "kinds", ()):
        return x.movedim(-1, 1)
    unbatched_dim = getattr(layer, "_get_no_batch_dim", None)
    return x[None] if unbatched_dim is not None and x.dim() == unbatched_dim() else x
