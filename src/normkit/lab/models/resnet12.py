"""The residual network of twelve convolutions that few-shot learning is compared on."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.models.architecture import Shapes, architecture
from normkit.lab.models.own import head

NUM_BLOCKS = 4


@architecture("resnet12")
@dataclass(frozen=True, slots=True, kw_only=True)
class ResNet12:
    """Four blocks of three convolutions; each doubles the channels and halves the map.

    The first block has ``width`` channels. A map of a single pixel is no longer halved, so that
    small pictures pass. Activations are swish, ``x * sigmoid(x)``.

    Source:
        Oreshkin, Lopez & Lacoste 2018, arXiv:1805.10123, section 4.
    """

    width: int = 64

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        before, height, width = shapes.input_shape
        layers: list[nn.Module] = []
        for at in range(NUM_BLOCKS):
            num_channels = 2**at * self.width
            layers.append(PooledBlock(before, num_channels))
            before = num_channels
            if min(height, width) > 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(before, shapes))


class PooledBlock(nn.Module):
    """Three convolutions, each with a norm, to which the input's 1x1 convolution is added."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)
        self.conv3 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(num_out)
        self.shortcut = nn.Conv2d(num_in, num_out, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(num_out)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """Activate the sum of both paths."""
        y = functional.silu(self.norm1(self.conv1(x)))
        y = functional.silu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return functional.silu(y + self.shortcut_norm(self.shortcut(x)))
