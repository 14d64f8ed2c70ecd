"""Feature maps of a classifier: what detection and segmentation networks are put on."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import SpecError
from normkit.passes import untouched
from normkit.text import listed, printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A feature map that a classifier goes through.

    Args:
        name: The module of the classifier that gives it.
        stride: Pixels of the picture for one of the map.
        shape: Channels, height and width.
    """

    name: str
    stride: int
    shape: tuple[int, int, int]


def levels_of(model: nn.Module, input_shape: tuple[int, int, int], name: str) -> tuple[Level, ...]:
    """Find the last map of each size that a classifier goes through.

    Args:
        model: Its parts are called one after the other, as those of torchvision's and timm's
            ResNets are, or it is an ``nn.Sequential``.
        input_shape: Channels, height and width of a picture.
        name: How messages call it.

    Raises:
        SpecError: If it has no such parts.
    """
    maps = _maps(model, input_shape)
    last = {tuple(found.shape[2:]): (at, found) for at, found in maps.items()}
    levels = tuple(
        Level(name=at, stride=round(input_shape[1] / found.shape[2]), shape=tuple(found.shape[1:]))
        for at, found in last.values()
        if found.shape[2] > 1
    )
    if not levels:
        raise SpecError(
            f"model {printable(name)} has no parts that give feature maps one after the other; "
            f"choose a ResNet such as torchvision:resnet50, or small-resnet"
        )
    return levels


def _maps(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """What each direct part of a model gives, if it is a map, in the order of the calls."""
    maps: dict[str, Tensor] = {}

    def keep(at: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                maps[at] = output.detach().clone()

        return hook

    hooks = [part.register_forward_hook(keep(at)) for at, part in model.named_children()]
    try:
        with untouched(model, training=False), torch.no_grad():
            model(_picture(input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def _picture(input_shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))


def chosen_levels(levels: tuple[Level, ...], least: int, name: str) -> tuple[Level, ...]:
    """The levels of a pyramid: those from a stride on, each of which halves the map.

    Raises:
        SpecError: If there are fewer than two.
    """
    found = tuple(level for level in levels if level.stride >= least)
    if len(found) < 2:
        strides = listed(level.stride for level in levels)
        raise SpecError(
            f"model {printable(name)} gives maps of strides {strides}, and a pyramid takes two or "
            f"more from stride {least} on; choose a model with more stages, or larger pictures"
        )
    return found


def require_same_maps(
    model: nn.Module, levels: tuple[Level, ...], input_shape: tuple[int, int, int], name: str
) -> dict[str, str]:
    """Make sure that a model's parts, called one after the other, are all of it.

    Returns:
        The names by which a pyramid gets the maps: the first level is "0".

    Raises:
        SpecError: If its forward does something between its parts.
    """
    names = {level.name: str(at) for at, level in enumerate(levels)}
    getter = importlib.import_module("torchvision.models._utils").IntermediateLayerGetter
    expected = _maps(model, input_shape)
    with untouched(model, training=False), torch.no_grad():
        found = getter(model, names)(_picture(input_shape))
    for level in levels:
        if not torch.equal(found[names[level.name]], expected[level.name]):
            raise SpecError(
                f"the forward of model {printable(name)} does more than to call its parts one "
                f"after the other; choose a ResNet such as torchvision:resnet50, or small-resnet"
            )
    return names
