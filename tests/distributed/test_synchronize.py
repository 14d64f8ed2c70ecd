"""Which norms ``synchronize_`` means, what it keeps, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from cases import randn
from convert.networks import timm


def network():
    """One norm of each kind that is treated in its own way."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU),
        nn.SyncBatchNorm(6),
        nk.InstanceBatchNorm(6),
        nk.LayerNorm(6, track_running_stats=True),
        nk.SwitchableNorm(6, use_batch=False),
        nn.GroupNorm(2, 6),
        nn.InstanceNorm2d(6, track_running_stats=True),
    ).double()


X = randn(4, 3, 7, 5)


def test_all_norms_with_batch_statistics_and_no_others():
    done = nk.synchronize_(network())
    assert done.names == ("1", "2", "3", "4", "5")
    assert done.replaced == ("1", "2", "3")
    assert list(done.left) == ["6", "7", "8"]
    assert "which convert_norm_ replaces" in done.left["8"]
    assert [getattr(m, "process_group", None) for m in done.model] == [
        None, "world", "world", "world", "world", "world", None, None, None,
    ]  # fmt: skip
    assert str(done).splitlines() == [
        "statistics over all processes: 1, 2, 3, 4, 5",
        "replaced by layers of normkit: 1, 2, 3",
        "left alone, it takes no statistics over a batch: 6, 7",
        f"left alone, {done.left['8']}: 8",
    ]


def test_outputs_state_and_parameters_stay():
    model = network()
    model(X) if torch.cuda.is_available() else model[:3](X)  # torch's SyncBatchNorm needs CUDA
    old, parameters = copy.deepcopy(model).eval(), list(model.parameters())
    nk.synchronize_(model)
    assert_close(model.eval()(X), old(X), rtol=1e-12, atol=1e-12)
    assert all(new is p for new, p in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == old.state_dict().keys()


def test_a_second_time_changes_no_layer():
    model = network()
    nk.synchronize_(model)
    layers = list(model.modules())
    again = nk.synchronize_(model)
    assert (again.names, again.replaced) == (("1", "2", "3", "4", "5"), ())
    assert all(new is old for new, old in zip(model.modules(), layers, strict=True))


def test_frozen_layers_stay_frozen():
    model = network()
    nk.freeze_statistics(model, where=lambda _, name: name in ("1", "4.batch"))
    before = type(model[1])
    done = nk.synchronize_(model)
    assert done.left["1"] == done.left["4"] == "its statistics are frozen"
    assert type(model[1]) is before
    assert model[4].process_group is None


def test_where_chooses():
    model = network()
    done = nk.synchronize_(model, where=lambda module, name: name == "1")
    assert done.names == ("1",)
    assert type(model[3]) is nn.SyncBatchNorm


def test_a_model_that_is_a_norm_itself():
    assert nk.synchronize_(nn.BatchNorm2d(6)).model.process_group == "world"
    ours = nk.BatchNorm(6)
    assert nk.synchronize_(ours).model is ours


class Reader(nn.Module):
    """Reads a field of its norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(x) * self.norm.running_var.mean()


def test_what_conversion_warns_of_is_told():
    model = nn.Sequential(Reader(), nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    model[1].weight.requires_grad_(False)
    done = nk.synchronize_(model)
    assert done.warnings.keys() == {"0.norm", "1"}
    told = [line for line in str(done).splitlines() if line.startswith(("0.norm:", "1:"))]
    assert len(told) == 2
    assert "reads its running_var" in told[0]
    assert "without a gradient" in told[1]


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("model", "group", "error", "message"),
    [
        (nn.Sequential(nn.GroupNorm(2, 6)), None, nk.OptionError, r"0: it takes no statistics ov"),
        (nn.Linear(2, 2), None, nk.OptionError, r"Linear has no norm .*; it has no norm at all"),
        (nn.Sequential(nn.BatchNorm2d(6), Own(6)), None, nk.ConversionError, r"1 to bn: .*Own has"),
        (nn.LazyBatchNorm2d(), None, nk.ConversionError, r"does not know its number of channels"),
        (nk.BatchNorm(6), "all", nk.OptionError, r"process_group='all' was given; it is a torch"),
        (torch.compile(nk.BatchNorm(6)), None, nk.OptionError, r"compiled .*synchronise the model"),
    ],
    ids=["one example", "no norm", "unknown", "lazy", "group", "compiled"],
)
def test_it_is_refused_before_anything_changes(model, group, error, message):
    layers = list(model.modules())
    with pytest.raises(error, match=message):
        nk.synchronize_(model, group)
    assert all(new is old for new, old in zip(model.modules(), layers, strict=True))
    assert not any(getattr(m, "process_group", None) for m in model.modules())


def test_statistics_that_no_longer_follow_are_kept_as_they_are():
    """``track_running_stats`` switched off after building: evaluate by them, leave them alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nk.BatchNorm(3))
    model(torch.randn(4, 3, 5, 5) + 2)
    for layer in model:
        layer.track_running_stats = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3, 5, 5)
    y = model.eval()(x)
    done = nk.synchronize_(model.train())
    assert done.names == ("0", "1")
    torch.testing.assert_close(model.eval()(x), y)
    model.train()(x)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
