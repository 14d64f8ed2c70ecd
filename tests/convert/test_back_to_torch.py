"""From normkit's layers to torch's own: the same function, for tools that look for the classes."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from convert.net import Net
from convert.networks import build, images
from normkit.errors import OptionError, TraceError

X = {
    0: torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),
    1: torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0)),
    2: torch.randn(5, 6, 4, 3, generator=torch.Generator().manual_seed(0)),
    3: torch.randn(5, 6, 2, 3, 4, generator=torch.Generator().manual_seed(0)),
}
LAYERS = {
    "BatchNorm1d": (lambda: nk.BatchNorm(6), 0),
    "BatchNorm1d, a series": (lambda: nk.BatchNorm(6, momentum=None), 1),
    "BatchNorm2d": (lambda: nk.BatchNorm(6, eps=1e-3, momentum=0.3), 2),
    "BatchNorm3d": (lambda: nk.BatchNorm(6, affine=False), 3),
    "BatchNorm2d, no statistics": (lambda: nk.BatchNorm(6, track_running_stats=False), 2),
    "InstanceNorm1d": (lambda: nk.InstanceNorm(6), 1),
    "InstanceNorm2d": (lambda: nk.InstanceNorm(6, eps=1e-2), 2),
    "InstanceNorm3d": (lambda: nk.InstanceNorm(6, affine=False), 3),
    "GroupNorm": (lambda: nk.GroupNorm(6, num_groups=3), 2),
    "GroupNorm, of one group": (lambda: nk.LayerNorm(6), 2),
}


def run(layer, x):
    """Outputs and gradients in both modes, and the buffers that training leaves."""
    layer = copy.deepcopy(layer)
    found = []
    for training in (True, False):
        x = x.detach().requires_grad_()
        y = layer.train(training)(x)
        grads = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
        found += [y, *grads]
    return [*found, *layer.state_dict().values()]


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_layer_is_the_same_function(name):
    make, num_axes = LAYERS[name]
    model = nn.Sequential(make())
    x = X[num_axes]
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model(x + 1)
    old, expected = model[0], run(model, x)
    parameters = list(model.parameters())
    done = nk.back_to_torch_(model, example_input=x)
    new = model[0]
    assert type(new).__module__.startswith("torch.nn")
    assert type(new).__name__ == name.partition(",")[0]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_close(run(model, x), expected, rtol=1e-4, atol=2e-5)
    assert done.revert()[0] is old


def test_without_an_example_the_old_class_says_the_number_of_axes():
    net = Net()
    done = nk.convert_norm_(net, {"layer1": "bn", "layer2": "in", "head": "gn:4"})
    x = torch.randn(3, 8, 4, 4)
    expected = net.eval()(x)
    back = done.back_to_torch()
    kinds = [type(net.get_submodule(c.name)).__name__ for c in back.changes]
    assert kinds == ["BatchNorm2d"] * 2 + ["InstanceNorm2d"] * 2 + ["GroupNorm"]
    assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    back.revert()
    assert isinstance(net.layer1[0].bn1, nk.BatchNorm)


def test_back_and_forth_keeps_the_layers_of_one_conversion_only():
    net = nn.Sequential(nn.BatchNorm2d(8), nk.GroupNorm(8, num_groups=2))
    done = nk.convert_norm_(net, "bn", where=lambda _, name: name == "0")
    done.back_to_torch()
    assert [type(m) for m in net] == [nn.BatchNorm2d, nk.GroupNorm]
    nk.back_to_torch_(net)
    assert type(net[1]) is nn.GroupNorm


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_vit"])
def test_networks_come_back_to_what_they_were(name):
    net, x = build(name).eval(), images(name, 2)
    before = [type(m) for m in net.modules()]
    expected = net(x)
    spec = "bn" if "resnet" in name else "pn"
    nk.convert_norm_(net, spec).back_to_torch(example_input=x)
    after = [type(m) for m in net.modules()]
    names = {"torch.nn.modules.normalization", "torch.nn.modules.batchnorm"}
    assert sum(kind.__module__ in names for kind in after) >= 5
    if "resnet" in name:
        assert after == before
    assert_close(net(x), expected, rtol=1e-3, atol=1e-4)


LEFT = {
    "torch has no such layer": lambda: nk.BatchGroupNorm(6, num_groups=2),
    "it goes on to relu, which no norm of torch does": lambda: nk.GroupNorm(
        6, num_groups=2, activation="relu"
    ),
    "example_weight=0.1, which torch's does not have": lambda: nk.BatchNorm(6, example_weight=0.1),
    "its running statistics are of whole batches": lambda: nk.InstanceNorm(
        6, track_running_stats=True
    ),
    "it keeps running statistics, which torch's does not": lambda: nk.GroupNorm(
        6, num_groups=2, track_running_stats=True
    ),
    "torch has it for channels on the last axis alone": lambda: nk.PositionalNorm(6),
    "its statistics are frozen, and torch's would not be": lambda: frozen(nk.BatchNorm(6)),
}


def frozen(layer):
    nk.freeze_statistics(layer)
    return layer


@pytest.mark.parametrize("why", LEFT)
def test_what_torch_does_not_have_is_left_and_said(why):
    layer = LEFT[why]()
    net = nn.Sequential(layer, nk.LayerNorm(6))
    done = nk.back_to_torch_(net, example_input=X[2])
    assert net[0] is layer
    assert why in str(done)
    with pytest.raises(OptionError, match=rf"no layer can become one of torch's\n  0: .*{why}"):
        nk.back_to_torch_(nn.Sequential(layer), example_input=X[2])


def test_activations_that_other_libraries_put_into_norms_are_left():
    net = build("timm:test_efficientnet")
    done = nk.convert_norm_(net, "bn")
    assert "it goes on to activation SiLU" in str(done.back_to_torch())


def test_a_norm_over_processes_is_torchs_synchronized_one():
    layer = nk.BatchNorm(6, process_group="world")
    nk.back_to_torch_(net := nn.Sequential(layer))
    assert type(net[0]) is nn.SyncBatchNorm


def test_statistics_of_a_16_bit_model_lose_digits_and_the_report_says_so():
    net = nn.Sequential(nk.BatchNorm(6)).bfloat16()
    net(X[2].bfloat16())
    expected = net.eval()(X[2].bfloat16())
    done = nk.back_to_torch_(net, example_input=X[2].bfloat16())
    assert done.changes[0].lost == ("digits of the running statistics, torch.bfloat16 now",)
    assert_close(net(X[2].bfloat16()), expected, rtol=2e-2, atol=2e-2)


def test_hooks_modes_and_frozen_buffers_go_along():
    layer = nk.BatchNorm(6)
    layer.track_running_stats = False
    layer.weight.requires_grad_(False)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    net = nn.Sequential(layer).eval()
    nk.back_to_torch_(net, example_input=X[2])
    seen.clear()
    net(X[2])
    assert seen == [1]
    assert not net[0].training
    assert not net[0].track_running_stats
    assert not net[0].weight.requires_grad


def test_what_is_missing_is_said():
    with pytest.raises(OptionError, match="has no layer of normkit, so there is nothing"):
        nk.back_to_torch_(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(OptionError, match="no layer of normkit that where= chooses"):
        nk.back_to_torch_(nn.Sequential(nk.BatchNorm(4)), lambda *_: False)
    with pytest.raises(OptionError, match=r"number of spatial axes.*pass example_input="):
        nk.back_to_torch_(nn.Sequential(nk.BatchNorm(4)))
    with pytest.raises(TraceError, match="does not accept the example input"):
        nk.back_to_torch_(nn.Sequential(nk.BatchNorm(4)), example_input=X[2])
    with pytest.raises(OptionError, match="a dry run has changed nothing"):
        nk.convert_norm_(nn.BatchNorm2d(4), "gn:2", dry_run=True).back_to_torch()
    back = nk.convert_norm_(nn.Sequential(nn.BatchNorm2d(4)), "gn:2").back_to_torch()
    with pytest.raises(OptionError, match="norms of torch, which a recipe does not name"):
        back.recipe()
