"""DeepLabV3 on any backbone: torchvision's, with an output stride and a multigrid of ones."""

import importlib
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from normkit.errors import SpecError
from normkit.lab.frozen import Frozen
from normkit.lab.models.features import Level, levels_of, require_same_maps
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.text import listed, printable

Size = Annotated[int, Field(ge=1, le=2**16)]


class SegmenterOptions(Frozen):
    """What decides a segmentation network besides its backbone and its norm."""

    stride: Size = Field(default=16, description="pixels of a picture for one of the last map")
    rate: Size = Field(default=6, description="the first of three dilation rates, 1, 2, 3 times it")
    channels: Size = Field(default=256, description="channels of the head, 1 or more")


def segmenter(
    backbone: nn.Module,
    options: SegmenterOptions,
    input_shape: tuple[int, int, int],
    num_classes: int,
) -> nn.Module:
    """Put DeepLabV3's head on a classifier, whose last maps keep the output stride.

    Args:
        backbone: A classifier; its parts become the network's, and are changed.
        options: Output stride, dilation rates and channels.
        input_shape: Channels, height and width of a picture.
        num_classes: Classes of a pixel, with the background.

    Raises:
        SpecError: If its parts give no maps, or do not keep the stride.
    """
    register_missing_operators()
    name = type(backbone).__name__
    keep_stride_(backbone, options.stride, input_shape, name)
    last = levels_of(backbone, input_shape, name)[-1]
    require_same_maps(backbone, (last,), input_shape, name)
    library = importlib.import_module("torchvision.models.segmentation.deeplabv3")
    getter = importlib.import_module("torchvision.models._utils").IntermediateLayerGetter
    rates, channels = [options.rate * at for at in (1, 2, 3)], options.channels
    head = nn.Sequential(
        library.ASPP(last.shape[0], rates, channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, num_classes, 1),
    )
    return library.DeepLabV3(getter(backbone, {last.name: "out"}), head, None)


def keep_stride_(
    model: nn.Module, stride: int, input_shape: tuple[int, int, int], name: str
) -> None:
    """Let the parts that would make maps smaller than a stride dilate their filters instead.

    All filters of such a part get the same rate: the multigrid is (1, 1, 1).

    Raises:
        SpecError: If maps become smaller all the same.
    """
    parts, rate = dict(model.named_children()), 1
    levels = levels_of(model, input_shape, name)
    for level in _beyond(levels, stride):
        rate *= 2
        for at in _since(list(parts), levels, level):
            for module in parts[at].modules():
                if isinstance(module, nn.Conv2d):
                    _dilate_(module, rate)
    if not _keeps(model, stride, input_shape, name):
        raise SpecError(
            f"model {printable(name)} cannot keep a stride of {stride}: its maps have strides "
            f"{listed(level.stride for level in levels)}, and its parts do not make them by "
            f"strided convolutions alone; choose torchvision:resnet50, or fewer stages"
        )


def _keeps(model: nn.Module, stride: int, input_shape: tuple[int, int, int], name: str) -> bool:
    """Whether a changed model works, and its last map is as large as a stride says."""
    try:
        return levels_of(model, input_shape, name)[-1].stride <= stride
    except RuntimeError:  # shortcuts that are still strided
        return False


def _beyond(levels: tuple[Level, ...], stride: int) -> list[Level]:
    return [level for level in levels if level.stride > stride]


def _since(parts: list[str], levels: tuple[Level, ...], level: Level) -> list[str]:
    """The parts after the level before, up to this one."""
    before = levels[levels.index(level) - 1].name
    return parts[parts.index(before) + 1 : parts.index(level.name) + 1]


def _dilate_(conv: Any, rate: int) -> None:
    conv.stride = (1, 1)
    if max(conv.kernel_size) > 1:
        conv.dilation = (rate, rate)
        conv.padding = tuple(rate * (side // 2) for side in conv.kernel_size)
