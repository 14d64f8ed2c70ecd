"""A model that is brought back, or was never left changed; words and pictures."""

import copy
import importlib
import random

import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.tune import search, sweep
from tune.nets import answers, data, distance, trained, tune_to


def mixed_net():
    """Torch's norm, one of ours that has a weight, and one in a composite, in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nk.BatchNorm(6, example_weight=0.2),
        nk.BatchChannelNorm(6, num_groups=2), nn.Flatten(), nn.Linear(294, 5),
    )  # fmt: skip
    trained(model).train()
    model[2].eval()
    model[1].register_forward_hook(lambda module, args, y: None)
    return model


class Snapshot:
    """Everything of a model that tuning could change."""

    def __init__(self, model):
        self.model = model
        self.modules = list(model.modules())
        self.modes = [m.training for m in self.modules]
        self.attributes = [{**vars(m)} for m in self.modules]
        self.hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in self.modules]
        self.objects = [*model.parameters(), *model.buffers()]
        self.values = [t.detach().clone() for t in self.objects]
        self.random = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - what users have

    def assert_same(self):
        model = self.model
        assert list(model.modules()) == self.modules
        assert [m.training for m in self.modules] == self.modes
        for module, attributes in zip(self.modules, self.attributes, strict=True):
            assert vars(module).keys() == attributes.keys()
            assert vars(module).get("_example_weight") == attributes.get("_example_weight")
        hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in self.modules]
        assert hooks == self.hooks
        found = [*model.parameters(), *model.buffers()]
        assert all(a is b for a, b in zip(found, self.objects, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, self.values, strict=True))
        assert all(p.grad is None for p in model.parameters())
        torch_state, python_state, numpy_state = self.random
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert random.getstate() == python_state
        assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@pytest.mark.parametrize("per_layer", [False, True])
def test_undo_brings_back_the_model_as_it_was(monkeypatch, per_layer):
    monkeypatch.setattr("normkit.tune.gradient.NUM_STEPS", 2)
    model = mixed_net()
    before = Snapshot(model)
    result = nk.tune_example_weight(model, data(), grid=(0.4,), per_layer=per_layer, refine=False)
    assert [m.training for m in model.modules()] == before.modes
    assert type(model[1]) is nk.BatchNorm
    assert result.undo() is model
    before.assert_same()
    result.undo()
    before.assert_same()


class Fails:
    """Raises at the n-th call, for as many calls as there are."""

    def __init__(self, function, at, error):
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *args, **named):
        self.calls += 1
        if self.calls >= self.at:
            raise self.error("injected")
        return self.function(*args, **named)


POINTS = {
    "converting": ("WeighedLayers.convert_", 1),
    "settling": ("Sweep._find_way", 1),
    "a shared forward": ("Sweep._outputs", 3),
    "a plain forward": ("Sweep._output", 4),
    "a gradient": ("_BatchCost.total", 2),
    "setting what was found": ("Tuning", 1),
}


@pytest.mark.parametrize(
    ("point", "error"),
    [
        *((point, KeyboardInterrupt) for point in POINTS),
        ("a plain forward", RuntimeError),  # plain ones take over where a shared one fails
        ("a gradient", RuntimeError),
    ],
)
def test_a_failure_anywhere_leaves_the_model_bit_equal(monkeypatch, point, error):
    name, at = POINTS[point]
    holder, _, attribute = name.rpartition(".")
    owners = {
        "WeighedLayers": sweep.WeighedLayers,
        "Sweep": sweep.Sweep,
        "_BatchCost": search.descend.__globals__["_BatchCost"],
        "": search,
    }
    fails = Fails(getattr(owners[holder], attribute), at, error)

    def wrapped(*args, **named):  # a function, so that methods get their object
        return fails(*args, **named)

    monkeypatch.setattr(owners[holder], attribute, wrapped)
    monkeypatch.setattr("normkit.tune.gradient.NUM_STEPS", 2)
    model = mixed_net()
    before = Snapshot(model)
    with pytest.raises(error, match="injected"):
        nk.tune_example_weight(model, data(), grid=(0.3, 0.6), per_layer=True, refine=False)
    assert fails.calls >= at
    before.assert_same()


def test_a_failing_metric_and_loader_leave_the_model_bit_equal():
    def loader():
        yield data()[0]
        raise OSError("disk")

    model = mixed_net()
    before = Snapshot(model)
    with pytest.raises(OSError, match="disk"):
        nk.tune_example_weight(model, loader())
    with pytest.raises(ZeroDivisionError):
        nk.tune_example_weight(model, data(), metric=lambda output, batch: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        nk.tune_example_weight(model, data(), metric=Fails(distance, 1, KeyboardInterrupt))
    before.assert_same()


def test_gain_on_other_data_leaves_the_model_as_it_is():
    result = tune_to(answers((0.3, 0.3)), grid=(0.3,), refine=False)
    result.model.train()
    before = Snapshot(result.model)
    result.gain_on(answers((0.3, 0.3)))
    with pytest.raises(KeyboardInterrupt):
        result.gain_on(answers((0.3, 0.3)), alpha=Interrupts({"1": 0.3}))
    before.assert_same()


class Interrupts(dict):
    """Weights of layers that cannot be read."""

    def __getitem__(self, name):
        raise KeyboardInterrupt


def test_other_batch_norms_are_left_alone_and_named():
    class Odd(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Odd(4), nn.Flatten())
    model.append(nn.Linear(196, 5))
    trained(model)
    result = nk.tune_example_weight(model, data(), grid=(0.3,), refine=False)
    assert type(model[2]) is Odd
    line = "left alone: 2: Odd is no batch norm that normkit can replace"
    assert line in str(result).splitlines()


def test_norms_with_an_activation_stay_exact():
    register_missing_operators()
    model = importlib.import_module("timm.layers").BatchNormAct2d(3)
    torch.manual_seed(0)
    net = trained(nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)))
    expected = net(data()[0][0])
    result = nk.tune_example_weight(net, data(), grid=(0.3,), refine=False)
    nk.set_example_weight(net, 0.0)
    torch.testing.assert_close(net(data()[0][0]), expected)
    assert result.how == "from the first norm on"
    assert result.undo()[0] is model


def test_a_table_has_a_row_for_each_weight_and_the_model_copies():
    result = tune_to(answers((0.3, 0.3)), grid=(0.3,), refine=False)
    lines = str(result).splitlines()
    assert lines[1].split() == ["alpha", "distance", "gain", "standard", "error"]
    assert lines[2].split()[0] == "0"
    assert lines[3].split()[0] == "0.3"
    assert repr(result).startswith("<Tuning: example weight of 2 layers, tuned for distance")
    assert copy.deepcopy(result.model)[1].example_weight == 0.3


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_curve_is_drawn(tmp_path, suffix):
    result = tune_to(answers((0.3, 0.3)))
    figure = result.plot(tmp_path / f"curve{suffix}")
    assert (tmp_path / f"curve{suffix}").stat().st_size > 5000
    axes = figure.axes[0]
    xs, ys = axes.lines[0].get_data()
    assert list(xs) == [point.alpha for point in result.curve]
    assert list(ys) == [point.gain for point in result.curve]
    assert "16 examples that did not choose" in axes.get_legend().get_texts()[0].get_text()
