"""Networks of the papers for 32x32 pictures: torchvision's with another stem, and ResNet-110."""

from dataclasses import dataclass

from torch import nn

from normkit.lab.models.architecture import Task, architecture
from normkit.lab.models.own import ResidualBlock
from normkit.lab.models.zoo import TorchvisionModel
from normkit.lab.torchvision_ops import register_missing_operators


def _small(name: str, task: Task) -> nn.Module:
    register_missing_operators()
    return TorchvisionModel(name=name).build(task)


def _stem(task: Task) -> nn.Conv2d:
    return nn.Conv2d(task.input_shape[0], 64, 3, padding=1, bias=False)


@architecture("cifar-resnet18")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarResNet18:
    """torchvision's ResNet-18, its stem one 3x3 convolution without pooling; 64 to 512 channels.

    Source:
        Summers & Dinneen, section 4.1; Qiao et al., table 8. The stem is the usual one for CIFAR,
        which neither of them writes out.
    """

    def build(self, task: Task) -> nn.Module:
        """Build the network for a task."""
        return _with_cifar_stem("resnet18", task)


@architecture("cifar-resnet50")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarResNet50:
    """torchvision's ResNet-50, its stem one 3x3 convolution without pooling.

    Source:
        Gunawan et al., tables 2 to 4; the stem is not said there.
    """

    def build(self, task: Task) -> nn.Module:
        """Build the network for a task."""
        return _with_cifar_stem("resnet50", task)


def _with_cifar_stem(name: str, task: Task) -> nn.Module:
    model = _small(name, task)
    model.conv1, model.maxpool = _stem(task), nn.Identity()
    return model


@architecture("cifar-densenet121")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarDenseNet121:
    """torchvision's DenseNet-121, its stem one 3x3 convolution without pooling.

    Source:
        Gunawan et al., figures 2 to 4; the stem is not said there.
    """

    def build(self, task: Task) -> nn.Module:
        """Build the network for a task."""
        model = _small("densenet121", task)
        model.features.conv0 = _stem(task)  # type: ignore[union-attr]
        model.features.pool0 = nn.Identity()  # type: ignore[union-attr]
        return model


@architecture("cifar-resnet110")
@dataclass(frozen=True, slots=True, kw_only=True)
class CifarResNet110:
    """Three stages of 18 basic blocks with 16, 32 and 64 channels; shortcuts have no parameters.

    ``blocks=9`` is ResNet-56, ``blocks=3`` ResNet-20.

    Source:
        He et al. 2015, arXiv:1512.03385, section 4.2, option A; Qiao et al., table 7.
    """

    width: int = 16
    blocks: int = 18

    def build(self, task: Task) -> nn.Module:
        """Build the network for a task."""
        layers: list[nn.Module] = [
            nn.Conv2d(task.input_shape[0], self.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
        ]
        before = self.width
        for factor in (1, 2, 4):
            for _ in range(self.blocks):
                layers.append(ResidualBlock(before, factor * self.width))
                before = factor * self.width
        head = nn.Linear(before, task.num_classes)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
