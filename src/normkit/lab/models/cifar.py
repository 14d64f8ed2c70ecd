"""Residual and dense networks as they are built for pictures of 32x32."""

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.errors import SpecError
from normkit.lab.models.architecture import Task, architecture
from normkit.lab.models.own import ResidualBlock, conv_norm_relu, head
from normkit.lab.torchvision_ops import register_missing_operators

DEPTHS = (18, 34, 50, 101, 152)
SMALL_DENSE_DEPTH = 21
DENSE_DEPTHS = (SMALL_DENSE_DEPTH, 121, 161, 169, 201)
THIN_WIDTHS = (16, 32, 64)


@architecture("cifar-resnet")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarResNet:
    """torchvision's ResNet of 64 to 512 channels, with a stem that does not shrink the picture.

    The stem is a 3x3 convolution of stride 1, in place of one of 7x7 and stride 2 and a pool.
    """

    depth: int = 18

    def build(self, task: Task) -> nn.Module:
        """Build the network for a task."""
        model = _torchvision_model("resnet", self.depth, DEPTHS, task)
        model.conv1, model.maxpool = _stem(model.conv1, task), nn.Identity()
        return model


@architecture("cifar-densenet")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarDenseNet:
    """torchvision's DenseNet, with the stem of ``cifar-resnet``.

    Depth 21 is ours, for small machines: four blocks of two layers that add 8 channels each.
    """

    depth: int = 121

    def build(self, task: Task) -> nn.Module:
        """Build the network for a task."""
        if self.depth == SMALL_DENSE_DEPTH:
            model = _small_densenet(task)
        else:
            model = _torchvision_model("densenet", self.depth, DENSE_DEPTHS, task)
        stem = model.features
        stem.conv0, stem.pool0 = _stem(stem.conv0, task), nn.Identity()
        return model


def _torchvision_model(family: str, depth: int, depths: tuple[int, ...], task: Task) -> Any:
    """Build one of torchvision's networks, whose attributes pyright does not know.

    Raises:
        SpecError: If there is none of this depth.
    """
    if depth not in depths:
        known = ", ".join(map(str, depths))
        raise SpecError(f"cifar-{family} was given depth={depth}; give one of {known}")
    register_missing_operators()
    models = importlib.import_module("torchvision.models")
    builder = models.get_model_builder(f"{family}{depth}")
    return builder(weights=None, num_classes=task.num_classes)


def _small_densenet(task: Task) -> Any:
    register_missing_operators()
    models = importlib.import_module("torchvision.models")
    sizes = {"growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16}
    return models.DenseNet(**sizes, num_classes=task.num_classes)


def _stem(replaced: nn.Conv2d, task: Task) -> nn.Conv2d:
    return nn.Conv2d(task.input_shape[0], replaced.out_channels, 3, padding=1, bias=False)


@architecture("thin-resnet")
@dataclass(frozen=True, slots=True, kw_only=True)
class ThinResNet:
    """Three stages of basic blocks with 16, 32 and 64 channels; shortcuts have no parameters.

    Source:
        He et al. 2015, arXiv:1512.03385, section 4.2: depths 20, 32, 44, 56 and 110.
    """

    depth: int = 20

    def build(self, task: Task) -> nn.Module:
        """Build the network for a task."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or not blocks:
            raise SpecError(
                f"thin-resnet was given depth={self.depth}; give 6n + 2, such as 20, 56 or 110"
            )
        before = THIN_WIDTHS[0]
        layers = [*conv_norm_relu(task.input_shape[0], before)]
        for width in THIN_WIDTHS:
            for _ in range(blocks):
                layers.append(ResidualBlock(before, width))
                before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(before, task))
