"""Layers that conversion has built can be traced, copied and pickled like the old ones."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import normkit as nk
from convert.networks import build, images, timm

CHANGES = {
    "an activation inside": ("timm:test_efficientnet", lambda m: nk.convert_norm_(m, "gn:max=4")),
    "a composite with one": ("timm:test_efficientnet", lambda m: nk.convert_norm_(m, "bcn:max=2")),
    "channels last": ("timm:test_convnext", lambda m: nk.convert_norm_(m, "pn")),
    "standardized weights": ("timm:test_resnet", lambda m: nk.convert_norm_(m, "gn:max=4+ws")),
    "a norm in a block": ("torchvision:resnet18", lambda m: nk.place_ibn_(m, "b")),
    "a norm in an activation": ("timm:test_resnet", lambda m: nk.place_gnbn_(m, "ln")),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("name", CHANGES)
def test_a_converted_network_is_handled_as_any(name):
    network, change = CHANGES[name]
    model, x = build(network), images(network, 2)
    change(model)
    y = model.eval()(x)
    twins = [
        torch.fx.symbolic_trace(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model))),
        torch.jit.trace(model, x, check_trace=False),
    ]
    for twin in twins:
        assert_close(twin(x), y, rtol=1e-4, atol=1e-4)


def test_features_are_extracted_as_before():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = build("torchvision:resnet18").eval(), images("torchvision:resnet18", 1)
    nk.convert_norm_(model, {"layer2": "gn:8+ws", "*": "bcn:8"})
    found = create_feature_extractor(model, ["layer2"])(x)["layer2"]
    seen = []
    model.layer2.register_forward_hook(lambda module, given, output: seen.append(output))
    model(x)
    assert_close(found, seen[0])
    backbone = timm.create_model("test_efficientnet", features_only=True, out_indices=(1, 2))
    nk.convert_norm_(backbone, "gn:max=4")
    assert [tuple(y.shape[:2]) for y in backbone(x)] == [(1, 24), (1, 32)]
