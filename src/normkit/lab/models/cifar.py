"""Residual and dense networks for pictures of 32x32, such as CIFAR's."""

import importlib
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import SpecError
from normkit.lab.models.architecture import Shapes, architecture
from normkit.lab.models.own import ResidualBlock, conv_norm_relu, head
from normkit.lab.torchvision_ops import register_missing_operators

DEPTHS = (18, 34, 50, 101, 152)
SMALL_DENSE_DEPTH = 21
DENSE_DEPTHS = (SMALL_DENSE_DEPTH, 121, 161, 169, 201)
THIN_WIDTHS = (16, 32, 64)


@architecture("cifar-resnet")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarResNet:
    """torchvision's ResNet with 64 to 512 channels, and a stem that keeps the picture's size.

    The stem is a 3x3 convolution of stride 1. It replaces torchvision's stem, a 7x7 convolution of
    stride 2 and a pooling layer.
    """

    depth: int = 18

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        model = _torchvision_model("resnet", self.depth, DEPTHS, shapes)
        model.conv1, model.maxpool = _stem(model.conv1, shapes), nn.Identity()
        return model


@architecture("cifar-densenet")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarDenseNet:
    """torchvision's DenseNet, with the stem of ``cifar-resnet``.

    Depth 21 is not from a paper. It is small: four blocks of two layers, which add 8 channels each.
    """

    depth: int = 121

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        if self.depth == SMALL_DENSE_DEPTH:
            model = _small_densenet(shapes)
        else:
            model = _torchvision_model("densenet", self.depth, DENSE_DEPTHS, shapes)
        stem = model.features
        stem.conv0, stem.pool0 = _stem(stem.conv0, shapes), nn.Identity()
        return model


def _torchvision_model(family: str, depth: int, depths: tuple[int, ...], shapes: Shapes) -> Any:
    """Build one of torchvision's networks, whose attributes pyright does not know.

    Raises:
        SpecError: If torchvision has no network of this depth.
    """
    if depth not in depths:
        known = ", ".join(map(str, depths))
        raise SpecError(f"cifar-{family} was given depth={depth}; give one of {known}")
    register_missing_operators()
    models = importlib.import_module("torchvision.models")
    builder = models.get_model_builder(f"{family}{depth}")
    return builder(weights=None, num_classes=shapes.num_classes)


def _small_densenet(shapes: Shapes) -> Any:
    register_missing_operators()
    models = importlib.import_module("torchvision.models")
    sizes = {"growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16}
    return models.DenseNet(**sizes, num_classes=shapes.num_classes)


def _stem(replaced: nn.Conv2d, shapes: Shapes) -> nn.Conv2d:
    return nn.Conv2d(shapes.input_shape[0], replaced.out_channels, 3, padding=1, bias=False)


@architecture("thin-resnet")
@dataclass(frozen=True, slots=True, kw_only=True)
class ThinResNet:
    """Three stages of basic blocks with 16, 32 and 64 channels; shortcuts have no parameters.

    Source:
        He et al. 2015, arXiv:1512.03385, section 4.2: depths 20, 32, 44, 56 and 110.
    """

    depth: int = 20

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or not blocks:
            raise SpecError(
                f"thin-resnet was given depth={self.depth}; give 6n + 2, such as 20, 56 or 110"
            )
        before = THIN_WIDTHS[0]
        layers = [*conv_norm_relu(shapes.input_shape[0], before)]
        for width in THIN_WIDTHS:
            for _ in range(blocks):
                layers.append(ResidualBlock(before, width))
                before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(before, shapes))


@architecture("wide-resnet")
@dataclass(frozen=True, slots=True, kw_only=True)
class WideResNet:
    """Three stages of pre-activation blocks, ``width`` times as wide as in ``ThinResNet``.

    ``wide-resnet:depth=10:width=2`` is WRN-10-2: a stem of 16 channels, one block each of 32, 64
    and 128, and a last norm. The stages after the first halve the map.

    Source:
        Zagoruyko & Komodakis 2016, arXiv:1605.07146, table 1.
    """

    depth: int = 10
    width: int = 2

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise SpecError(
                f"wide-resnet was given depth={self.depth}; give 6n + 4, such as 10, 16 or 28"
            )
        before = THIN_WIDTHS[0]
        layers: list[nn.Module] = [
            nn.Conv2d(shapes.input_shape[0], before, 3, padding=1, bias=False)
        ]
        for stage, width in enumerate(THIN_WIDTHS):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(PreactivatedBlock(before, self.width * width, stride))
                before = self.width * width
        layers += [nn.BatchNorm2d(before), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(before, shapes))


class PreactivatedBlock(nn.Module):
    """Two convolutions, each after a norm and a ReLU; the block adds its input to their result.

    If the number of channels or the size of the map changes, it adds a 1x1 convolution of the
    normalised input instead.
    """

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        changes = num_in != num_out or stride != 1
        self.shortcut = nn.Conv2d(num_in, num_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Two convolutions, plus the input or its 1x1 convolution."""
        activated = functional.relu(self.norm1(x))
        y = self.conv2(functional.relu(self.norm2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))
