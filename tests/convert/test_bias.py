"""A norm with a scale and no shift keeps that in every conversion."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.spec import METHODS

SPECS = [name if recipe.argument is None else f"{name}:2" for name, recipe in METHODS.items()] + [
    "bcn:2:micro",
    "bcn:2:channel_affine=channel",
]


def without_bias(layer):
    """The layer with a scale alone: of every torch, also those that have no such option."""
    layer.bias = None
    return layer


def sources():
    yield "BatchNorm2d", without_bias(nn.BatchNorm2d(8))
    yield "GroupNorm", without_bias(nn.GroupNorm(2, 8))
    yield "InstanceNorm2d", without_bias(nn.InstanceNorm2d(8, affine=True))
    yield "LayerNorm", nn.LayerNorm(8, bias=False)
    yield "ours", nk.BatchNorm(8, bias=False)
    for kind, arguments in ((nn.BatchNorm2d, (8,)), (nn.GroupNorm, (2, 8))):
        try:
            yield f"{kind.__name__}(bias=False)", kind(*arguments, bias=False)
        except TypeError:  # an older torch
            return


SOURCES = dict(sources())


def keys_of(model):
    return {name.rpartition(".")[2] for name, _ in model.named_parameters()}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", SOURCES)
def test_no_bias_is_gained_and_the_optimizer_has_every_parameter(name, spec):
    old = SOURCES[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), old)
    shape = (4, 3, 6, 8) if name == "LayerNorm" else (4, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = nk.convert_norm_(model, spec, optimizer=optimizer)
    assert "bias" not in keys_of(model[1])
    assert all("bias" not in key for key in model[1].state_dict())
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    for change in done.changes:
        assert not any("gains" in warning for warning in change.warnings)
    if name != "LayerNorm":
        assert model(torch.randn(shape)).isfinite().all()
    done.revert()


@pytest.mark.parametrize("spec", SPECS)
def test_ours_without_a_bias_become_others_and_come_back(spec):
    x = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    first = nk.convert_norm(nk.BatchNorm(8, bias=False), spec).model
    again = nk.convert_norm(first, "bn").model
    assert keys_of(again) == {"weight"}
    assert again(x).isfinite().all()


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d"])
def test_the_same_norm_computes_the_same(name):
    old = SOURCES[name]
    x = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    spec = {"BatchNorm2d": "bn", "GroupNorm": "gn:2", "InstanceNorm2d": "in"}[name]
    done = nk.convert_norm(old, spec)
    assert_close(done.model.eval()(x), old.eval()(x))
    assert "bias=False" in done.changes[0].carried


def test_a_spec_may_ask_for_a_bias():
    done = nk.convert_norm(without_bias(nn.BatchNorm2d(8)), "gn:2:bias=true")
    assert done.model.bias is not None
    assert done.changes[0].warnings == ("it had no bias and gets one, initialised to 0",)
    assert nk.convert_norm(nn.BatchNorm2d(8), "gn:2:bias=false").changes[0].lost == (
        "bias", "running statistics",
    )  # fmt: skip


def test_synchronizing_gains_no_bias():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), without_bias(nn.BatchNorm2d(8)))
    saved, parameters = model.state_dict(), list(model.parameters())
    nk.synchronize_(model)
    model.load_state_dict(saved)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_calibration_goes_without_a_shift():
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), without_bias(nn.BatchNorm2d(8)))
    model(x)
    expected = model.eval()(x)
    done = nk.convert_norm_(model, "gn:2", calibrate=[x])
    assert done.calibration.num_layers == 1
    assert_close(model(x).std((0, 2, 3)), expected.std((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_a_scale_alone_folds():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), without_bias(nn.BatchNorm2d(8))).eval()
    done = nk.fold(model, torch.randn(2, 3, 4, 4))
    assert [row.name for row in done.folded] == ["1"]
