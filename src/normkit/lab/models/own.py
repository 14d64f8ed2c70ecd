"""Small networks for small pictures, all with batch norm."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import SpecError
from normkit.lab.models.architecture import Shapes, architecture

MAX_STAGES = 8
VGG11_WIDTHS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


@architecture("small-resnet")
@dataclass(frozen=True, slots=True, kw_only=True)
class SmallResNet:
    """A stem and stages of residual blocks; each stage halves the map and doubles the channels.

    Shortcuts have no parameters and no norms.

    Source:
        He et al. 2015, arXiv:1512.03385, section 4.2, option A.
    """

    width: int = 16
    blocks: int = 1
    stages: int = 2

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        if self.stages > MAX_STAGES:
            raise SpecError(
                f"small-resnet was given stages={self.stages}; give 1 to {MAX_STAGES}, as each "
                f"doubles the channels"
            )
        stages = [2 ** (at + 1) * self.width for at in range(self.stages)]
        widths = [width for width in stages for _ in range(self.blocks)]
        layers = [*conv_norm_relu(shapes.input_shape[0], self.width)]
        before = self.width
        for width in widths:
            layers.append(ResidualBlock(before, width))
            before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(before, shapes))


class ResidualBlock(nn.Module):
    """Two convolutions, to whose result the block adds its input."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.stride = 1 if num_in == num_out else 2
        self.conv1 = nn.Conv2d(num_in, num_out, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Two convolutions, plus the input, sub-sampled and padded with zero channels."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        missing = y.shape[1] - x.shape[1]
        return functional.relu(y + functional.pad(shortcut, (0, 0, 0, 0, 0, missing)))


@architecture("mlp")
@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Linear layers of equal width, each with a norm and a ReLU.

    Source:
        Huang et al. 2022, section 3: 20 layers of 128.
    """

    depth: int = 20
    width: int = 128

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        channels, height, width = shapes.input_shape
        sizes = [channels * height * width] + [self.width] * (self.depth - 1)
        layers: list[nn.Module] = [nn.Flatten()]
        for size in sizes:
            layers += [
                nn.Linear(size, self.width, bias=False),
                nn.BatchNorm1d(self.width),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, head(self.width, shapes))


@architecture("vgg11")
@dataclass(frozen=True, slots=True, kw_only=True)
class Vgg11:
    """VGG-11 for small pictures, with one linear layer; it pools until the map is one position.

    With ``stacked`` each norm comes after a group norm of so many groups, which is not replaced
    when the network's norms are replaced: Gunawan et al., appendix A.5.

    Source:
        Simonyan & Zisserman 2014, arXiv:1409.1556, configuration A.
    """

    stacked: int = 0

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        before, height, width = shapes.input_shape
        layers: list[nn.Module] = []
        for stage in VGG11_WIDTHS:
            for num_channels in stage:
                conv, *rest = conv_norm_relu(before, num_channels)
                first = [nn.GroupNorm(self.stacked, num_channels)] if self.stacked else []
                layers += [conv, *first, *rest]
                before = num_channels
            if min(height, width) > 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(before, shapes))


def conv_norm_relu(num_in: int, num_out: int) -> tuple[nn.Module, ...]:
    """A 3x3 convolution, a batch norm and a ReLU."""
    conv = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(num_out), nn.ReLU()


def head(num_features: int, shapes: Shapes) -> nn.Linear:
    """The linear layer that computes the classes' scores."""
    return nn.Linear(num_features, shapes.num_classes)


def initialise(model: nn.Module) -> None:
    """Initialise the weights of convolutions and linear layers: normal, variance 2 / fan-in.

    Biases are set to 0.

    Source:
        He et al. 2015, arXiv:1502.01852, eq. 10.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
