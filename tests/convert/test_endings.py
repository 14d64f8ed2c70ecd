"""No tool that changes a model's norms loses the activation or the residual of one."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from cases import MAIN
from convert.networks import build, images
from normkit.layers.base import NormLayer

SPECS = ("bn", "in", "ln", "gn:2", "pn", "bgn:2", "ghost:2", "gbgn:2:examples=2", "gw:2",
         "bcn:2", "gnplus:2", "sn", "ibn")  # fmt: skip


class Net(nn.Module):
    """A norm behind a convolution, with a sum and an activation of its own."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), norm

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y, residual=y.flip(1))


def batch(seed=0):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def ended(norm, y, residual):
    """What a norm with a leaky ReLU gives, by a copy of it that has none."""
    plain = copy.deepcopy(norm)
    plain.activation = None
    return nn.functional.leaky_relu(plain(y) + residual, 0.3)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_a_conversion_keeps_them_there_and_back(case, spec):
    model = Net(case.make(activation="leaky_relu", negative_slope=0.3))
    model(batch())
    done = nk.convert_norm_(model, spec)
    found = [m for m in model.modules() if isinstance(m, NormLayer) and m.activation is not None]
    assert [(m.activation, m.negative_slope) for m in found] == [("leaky_relu", 0.3)]
    assert found == [model.norm]
    y = model.conv(batch(1))
    assert_close(model.eval()(batch(1)), ended(model.norm, y, y.flip(1)))
    nk.convert_norm_(model, "bn").revert()
    assert model.norm.activation == "leaky_relu"
    done.revert()
    assert (model.norm.activation, model.norm.negative_slope) == ("leaky_relu", 0.3)


NETWORK = "timm:test_resnet"
IMAGES = images(NETWORK, 4)
TOOLS = {
    "four_things": lambda model: nk.four_things(model, 2),
    "synchronize_": nk.synchronize_,
    "freeze": nk.freeze_statistics,
    "freeze and thaw": lambda model: (nk.freeze_statistics(model), nk.thaw_statistics(model)),
    "guard": nk.guard_statistics_,
    "set_example_weight": lambda model: nk.set_example_weight(model, 0.0),
    "recalibrate": lambda model: nk.recalibrate(model, [(IMAGES,)]),
    "fold": lambda model: nk.fold(model, IMAGES),
    "place_gnbn_": lambda model: nk.place_gnbn_(model, example_input=IMAGES),
    "bn": lambda model: nk.convert_norm_(model, "bn"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_keep_what_was_fused(name):
    model = build(NETWORK)
    nk.fuse_activations_(model, IMAGES)
    before = sorted(endings(model))
    assert len(before) > 5
    done = TOOLS[name](model)
    if name == "fold":
        with torch.no_grad():
            assert_close(done.model(IMAGES), model.eval()(IMAGES), atol=1e-3, rtol=1e-3)
        return
    assert sorted(endings(model)) == before


def endings(model):
    return [(n, m.activation) for n, m in model.named_modules()
            if isinstance(m, NormLayer) and m.activation is not None]  # fmt: skip
