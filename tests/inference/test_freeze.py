"""Frozen statistics: through every way in which a mode is set or a model copied."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.layers.base import TrackingLayer
from normkit.passes import untouched

register_missing_operators()
from timm.layers import BatchNormAct2d  # noqa: E402 - torchvision's operators come first

LAYERS = {
    "torch bn": lambda: nn.BatchNorm2d(6),
    "torch sync": lambda: nn.SyncBatchNorm(6),
    "torch in": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "timm": lambda: BatchNormAct2d(6),
    "bn": lambda: nk.BatchNorm(6),
    "bn, weighed": lambda: nk.BatchNorm(6, example_weight=0.3),
    "bgn": lambda: nk.BatchGroupNorm(6, num_groups=2),
    "ghost": lambda: nk.GhostBatchNorm(6, ghost_batch_size=2),
    "gn": lambda: nk.GroupNorm(6, num_groups=3, track_running_stats=True, example_weight=0.5),
    "bcn": lambda: nk.BatchChannelNorm(6, num_groups=3),
    "bcn, micro": lambda: nk.BatchChannelNorm(6, num_groups=3, micro_batch=True),
    "gnplus": lambda: nk.GroupNormPlus(6, num_groups=3),
    "sn": lambda: nk.SwitchableNorm(6),
    "ibn": lambda: nk.InstanceBatchNorm(6),
    "channels last": lambda: nk.convert_norm(nn.LayerNorm(6), "bn").model,
}


def data():
    return torch.randn(4, 6, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


def trained(make):
    """A model whose statistics are those of some other data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), make())
    for _ in range(3):
        model(torch.randn(4, 6, 6, 6) * 0.5 - 1)
    return model


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, values):
    assert model.state_dict().keys() == values.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_layer_does_in_training_what_it_does_at_evaluation(name):
    model, x = trained(LAYERS[name]), data()
    before = values_of(model)
    plain = copy.deepcopy(model).eval()(x)
    moving = copy.deepcopy(model).train()(x)
    assert name == "channels last" or not torch.allclose(plain, moving, atol=1e-2)
    names = nk.freeze_statistics(model)
    assert nk.freeze_statistics(model) == names
    assert_close(model.train()(x), plain)
    model[1].train()
    for part in model.modules():
        part.training = True
    y = model(x)
    assert_close(y, plain)
    y.square().sum().backward()
    assert_same(model, before)
    learned = [p.grad for p in model.parameters()]
    assert learned
    assert all(g.abs().sum() > 0 for g in learned)
    assert nk.thaw_statistics(model) == names
    assert nk.thaw_statistics(model) == ()
    assert_close(model(x), moving)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles_stay_frozen_and_are_thawed_alone(name):
    model, x = trained(LAYERS[name]), data()
    kinds = [type(module) for module in model.modules()]
    names = nk.freeze_statistics(model)
    averaged = AveragedModel(model).module
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), averaged):
        assert_close(other.train()(x), model(x))
        assert nk.thaw_statistics(other) == names
        assert [type(module) for module in other.modules()] == kinds
    assert nk.thaw_statistics(model) == names


def net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nk.BatchChannelNorm(6, num_groups=3)
    )


def test_where_chooses_and_names_are_those_of_the_model():
    model = net()
    assert nk.freeze_statistics(model, lambda layer, _: isinstance(layer, TrackingLayer)) == (
        "2.batch",
    )
    assert nk.freeze_statistics(model) == ("1", "2.batch")
    assert nk.thaw_statistics(model, lambda _, name: name == "1") == ("1",)
    assert [m.training for m in (model[1], model[2].batch)] == [True, False]


def test_a_wrapped_model_is_frozen_inside():
    model = net()
    assert nk.freeze_statistics(DataParallel(model)) == ("1", "2.batch")
    assert nk.thaw_statistics(DataParallel(model)) == ("1", "2.batch")


def test_nothing_to_freeze_is_an_error_and_nothing_to_thaw_is_not():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))
    with pytest.raises(nk.OptionError, match="Sequential has no layer with running statistics"):
        nk.freeze_statistics(model)
    assert nk.thaw_statistics(model) == ()
    with pytest.raises(nk.OptionError, match=r"none of the 2 layers; they are: 1, 2\.batch"):
        nk.freeze_statistics(net(), lambda _, name: name == "bn1")
    frozen = nn.BatchNorm2d(6)
    nk.freeze_statistics(frozen)
    with pytest.raises(nk.OptionError, match="chooses none of the 1 layers; they are: the model"):
        nk.thaw_statistics(frozen, lambda *_: False)
    assert not frozen.training


def test_a_layer_without_a_size_is_refused_and_the_others_stay_free():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(nk.OptionError, match=r"layer '1' \(LazyBatchNorm2d\) does not know"):
        nk.freeze_statistics(model)
    assert model[0].training


def test_an_interruption_freezes_nothing(monkeypatch):
    model, made = net(), []

    def interrupted(kind):
        made.append(kind)
        if len(made) == 2:
            raise KeyboardInterrupt
        return kind

    monkeypatch.setattr("normkit.inference.freeze._frozen_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nk.freeze_statistics(model)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("mode", [True, False])
def test_a_thawed_layer_has_the_mode_that_the_model_was_put_in(mode):
    model = net().train(not mode)
    nk.freeze_statistics(model)
    model.train(mode)
    with untouched(model, training=not mode):
        assert not model[1].training
    nk.thaw_statistics(model)
    assert model[1].training is model[2].batch.training is mode


def test_checkpoints_are_those_of_free_layers():
    model, other = net(), net()
    model(torch.randn(4, 3, 8, 8))
    nk.freeze_statistics(other)
    other.load_state_dict(model.state_dict())
    assert_same(other, values_of(model))
    assert other.state_dict()._metadata == model.state_dict()._metadata


def test_compilation_follows_freezing_and_thawing():
    torch.compiler.reset()
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    moving = compiled(x)
    assert nk.freeze_statistics(compiled) == ("1",)
    before = values_of(model)
    still = compiled(x)
    assert_close(still, model.eval()(x))
    assert_close(compiled.train()(x), still)
    assert_same(model, before)
    assert nk.thaw_statistics(compiled) == ("1",)
    assert_close(compiled(x), moving)


def test_a_frozen_layer_is_exported_and_traced():
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(4, 3, 8, 8)
    nk.freeze_statistics(model)
    assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    assert_close(torch.fx.symbolic_trace(model)(x), model(x))
