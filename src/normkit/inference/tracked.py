"""Which modules keep running statistics, and where these are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from normkit.errors import OptionError
from normkit.layers.base import BUFFERS, TrackingLayer

Where = Callable[[nn.Module, str], bool]
STATISTICS = (*BUFFERS, "num_batches_tracked")


def bare(model: nn.Module) -> nn.Module:
    """Return a model without DistributedDataParallel, DataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model


def keeps_statistics(module: nn.Module) -> bool:
    """Whether this is a norm of torch, a subclass, or one of ours, with running statistics."""
    return isinstance(module, _NormBase | TrackingLayer) and module.running_mean is not None


def tracked(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers with running statistics, the insides of composites among them.

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


def chosen(layers: Mapping[str, nn.Module], where: Where | None) -> dict[str, nn.Module]:
    """Those layers that ``where`` takes; all without it.

    Raises:
        OptionError: If it takes none.
    """
    if where is None:
        return dict(layers)
    found = {name: layer for name, layer in layers.items() if where(layer, name)}
    if not found:
        names = ", ".join(name or "the model itself" for name in layers)
        raise OptionError(f"where= chooses none of the {len(layers)} layers; they are: {names}")
    return found


def statistics_of(layer: nn.Module) -> dict[str, Tensor]:
    """Running statistics of a layer by name; old checkpoints may lack the count of batches."""
    return {n: b for n in STATISTICS if (b := layer._buffers.get(n)) is not None}


def feature_map(layer: nn.Module, x: Any) -> Any:  # noqa: ANN401 - what a hook is given
    """Return a layer's input with the channels in the second axis.

    A converted layer that takes channels last says so itself; torch's instance norms take an
    example without its batch axis.
    """
    if "ChannelsLast" in getattr(layer, "kinds", ()):
        return x.movedim(-1, 1)
    alone = getattr(layer, "_get_no_batch_dim", None)
    return x[None] if alone is not None and x.dim() == alone() else x
