"""Networks of the papers that the lab's own models do not cover."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from normkit import BatchNorm, build
from normkit.lab.arms import NONE as NO_NORM
from normkit.lab.data import Dataset
from normkit.lab.models import build_model
from normkit.lab.models.own import VGG11_WIDTHS, initialise


def seeded_network(model: str, norm: str, dataset: Dataset, seed: int) -> nn.Module:
    """One of the lab's models with a norm throughout; ``"none"`` leaves norms out.

    Equal seeds give equal weights, whatever the norm.
    """
    return build_model(
        model,
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        norm=norm,
        seed=seed,
    ).model


def vgg11(norm: str, dataset: Dataset, width: int, seed: int) -> nn.Module:
    """VGG-11 whose first layer has ``width`` channels (the paper's 64), the others in proportion.

    Source:
        Simonyan & Zisserman 2014, arXiv:1409.1556, configuration A.
    """
    before, height, wide = dataset.input_shape
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for stage in VGG11_WIDTHS:
            for full in stage:
                channels = full * width // VGG11_WIDTHS[0][0]
                conv = nn.Conv2d(before, channels, 3, padding=1, bias=norm == NO_NORM)
                layers += [conv, _norm(norm, channels), nn.ReLU()]
                before = channels
            if min(height, wide) > 1:
                layers.append(nn.MaxPool2d(2))
                height, wide = height // 2, wide // 2
        head = nn.Linear(before, dataset.num_classes)
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        torch.manual_seed(seed)
        initialise(model)
    return model


def _norm(norm: str, channels: int) -> nn.Module:
    return nn.Identity() if norm == NO_NORM else build(norm, channels)


class DrawnNorm(nn.Module):
    r"""Batch norm to a drawn mean and scale of each channel instead of 0 and 1.

    .. math::  y_c = \gamma_c (\hat\sigma_c \hat x_c + \hat\mu_c) + \beta_c, \quad
               \hat\mu_c \sim N(0, \sigma_\mu), \quad \log\hat\sigma_c \sim N(0, \sigma_\sigma)

    The draws stay as they are; the affine parameters are learned.

    Args:
        num_features: Channels.
        mean_spread: Standard deviation of the means.
        scale_spread: Standard deviation of the logarithms of the scales.
        generator: Of the draws.

    Source:
        Qiao et al., eqs. 33 and 34.
    """

    def __init__(
        self,
        num_features: int,
        mean_spread: float,
        scale_spread: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.norm = BatchNorm(num_features, affine=False)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        means, scales = torch.randn(2, num_features, generator=generator)
        self.register_buffer("means", mean_spread * means)
        self.register_buffer("scales", (scale_spread * scales).exp())

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n c *s"]:
        """Normalise, move to the drawn mean and scale, then scale and shift."""
        weight, bias, mean, scale = (
            values.view(-1, *[1] * (x.ndim - 2))
            for values in (
                *(self.weight, self.bias),
                *(self.get_buffer("means"), self.get_buffer("scales")),
            )
        )
        return weight * (scale * self.norm(x) + mean) + bias


def four_layers(dataset: Dataset, width: int, spreads: tuple[float, float], seed: int) -> nn.Module:
    """Four convolutions, each with a drawn norm, a ReLU and a pooling, and a linear layer.

    Source:
        Qiao et al., section 6.1.3.
    """
    before = dataset.input_shape[0]
    layers: list[nn.Module] = []
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        for _ in range(4):
            conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
            norm = DrawnNorm(width, *spreads, generator)
            layers += [conv, norm, nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)]
            before = width
        head = nn.Linear(width, dataset.num_classes)
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        torch.manual_seed(seed)
        initialise(model)
    return model
