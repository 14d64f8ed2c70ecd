"""The papers' networks for 32x32 pictures: sizes of weights and maps, and norms that fit."""

import pytest
import torch
from torch import nn

from normkit.lab.models import ARCHITECTURES, build_model

PUBLISHED = {  # parameters for 10 classes, written down from the papers or counted by hand
    "cifar-resnet18": (11_173_962, 4),  # 64, 128, 256 and 512 channels on 32x32 to 4x4
    "cifar-resnet50": (23_520_842, 4),
    "cifar-resnet110": (1_727_962, 8),  # 1.7 million in He et al., table 6
    "cifar-resnet110:blocks=3": (269_722, 8),  # ResNet-20: 0.27 million
    # torchvision's 7,978,856, with 10 instead of 1000 classes and 3x3 instead of 7x7
    "cifar-densenet121": (7_978_856 - 1025 * 990 - 64 * 3 * (49 - 9), 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_maps_have_the_published_sizes(name):
    num_parameters, side = PUBLISHED[name]
    model = build_model(name, num_classes=10).model.eval()
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    maps = []
    norms[0].register_forward_pre_hook(lambda _m, args: maps.append(args[0].shape[-1]))
    norms[-1].register_forward_pre_hook(lambda _m, args: maps.append(args[0].shape[-1]))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert maps == [32, side]


def test_resnet_110_has_110_layers_with_weights():
    model = build_model("cifar-resnet110", num_classes=10).model
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 110


@pytest.mark.parametrize(
    "name", ["cifar-resnet18", "cifar-densenet121", "cifar-resnet110:blocks=1"]
)
def test_a_paper_network_trains_a_step_on_grey_pictures_with_another_norm(name):
    built = build_model(name, num_classes=4, input_shape=(1, 16, 16), norm="gn:max=8", batch_size=2)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in built.model.modules())
    built.model(torch.randn(2, 1, 16, 16)).sum().backward()


def test_they_are_listed():
    assert {name.partition(":")[0] for name in PUBLISHED} <= set(ARCHITECTURES)
