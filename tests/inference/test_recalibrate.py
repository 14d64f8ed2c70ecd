"""Recalibrated statistics against those of the concatenated inputs, by definition in float64."""

import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import normkit as nk
from inference.net import SIZES, data, net
from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()
from timm.layers import BatchNormAct2d  # noqa: E402 - torchvision's operators come first

EXACT = {"rtol": 1e-6, "atol": 1e-6}


class LastAxis(nn.Module):
    """A converted layer norm takes the channels in the last axis."""

    def __init__(self):
        super().__init__()
        self.norm = nk.convert_norm(nn.LayerNorm(6), "bn").model

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


CHANNELS = {
    "torch bn": lambda: nn.BatchNorm2d(6),
    "torch bn, momentum None": lambda: nn.BatchNorm2d(6, momentum=None),
    "torch sync": lambda: nn.SyncBatchNorm(6),
    "timm": lambda: BatchNormAct2d(6),
    "bn": lambda: nk.BatchNorm(6),
    "bn, weighed": lambda: nk.BatchNorm(6, example_weight=0.3),
    "ghost": lambda: nk.GhostBatchNorm(6, ghost_batch_size=2),
    "tracked gn": lambda: nk.GroupNorm(6, num_groups=3, track_running_stats=True),
    "bcn": lambda: nk.BatchChannelNorm(6, num_groups=3),
    "sn": lambda: nk.SwitchableNorm(6),
    "channels last": LastAxis,
}


def of_groups(x, num_groups=6):
    """Mean and unbiased variance of each run of the flattened ``(C, *S)``."""
    runs = x.double().reshape(len(x), num_groups, -1).movedim(1, 0).reshape(num_groups, -1)
    mean = runs.sum(dim=1) / runs.shape[1]
    return mean, (runs - mean[:, None]).square().sum(dim=1) / (runs.shape[1] - 1)


def kept(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def found(patch):
    (row,) = patch.layers
    return row.new["running_mean"], row.new["running_var"]


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
@pytest.mark.parametrize("name", CHANNELS)
def test_statistics_are_those_of_the_concatenated_inputs(name, sequential):
    model, x = net(CHANNELS[name]), data()
    with torch.no_grad():
        expected = of_groups(model[0](x))
    for batches in itertools.permutations(x.split(SIZES)):
        patch = nk.recalibrate(model, list(batches), sequential=sequential)
        for values, wanted in zip(found(patch), expected, strict=True):
            assert_close(values.double(), wanted, **EXACT)
        assert patch.layers[0].num_values == 17 * 5 * 3
        assert patch.layers[0].new["num_batches_tracked"] == patch.num_batches == 3


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
def test_other_groups_have_statistics_of_their_own(sequential):
    x = data()
    bgn, micro, instance = (
        net(make)
        for make in (
            lambda: nk.BatchGroupNorm(6, num_groups=10),  # parts of channels: 90 values
            lambda: nk.BatchChannelNorm(6, num_groups=3, micro_batch=True),
            lambda: nn.InstanceNorm2d(6, track_running_stats=True),
        )
    )
    with torch.no_grad():
        y = bgn[0](x)
    of_examples = [torch.stack(s).mean(0) for s in zip(*map(of_groups, y.split(1)), strict=True)]
    biased = of_groups(y)[1] * (1 - 1 / (17 * 15))
    for model, expected in [
        (bgn, of_groups(y, 10)),
        (micro, (of_groups(y)[0], biased)),
        (instance, of_examples),
    ]:
        patch = nk.recalibrate(model, x.split(SIZES), sequential=sequential)
        for values, wanted in zip(found(patch), expected, strict=True):
            assert_close(values.double(), wanted, **EXACT)


def test_an_instance_norm_takes_examples_without_a_batch_axis():
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    x = data()
    alone = nk.recalibrate(layer, list(x))
    assert alone.layers[0].num_values == 17
    for one, other in zip(found(alone), found(nk.recalibrate(layer, [x])), strict=True):
        assert_close(one, other)


def digits():
    images, labels = load_digits(return_X_y=True)
    order = torch.argsort(torch.tensor(labels), stable=True)
    return torch.tensor(images, dtype=torch.float32)[order] / 16


def test_torch_errs_by_tens_of_percent_where_we_do_not():
    """A loader without shuffle goes through the classes: no batch has the spread of all."""
    x = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16))
    with torch.no_grad():
        _, var = of_groups(model[0](x), 16)
    batches = x.split(128)  # 14 of 128 and one of 5
    update_bn(batches, model)
    theirs = (model[1].running_var / var - 1).abs()
    assert 0.2 < theirs.mean() < theirs.max() < 0.7
    nk.recalibrate(model, batches).apply()
    assert (model[1].running_var / var - 1).abs().max() < 1e-6


def test_torch_errs_on_batches_of_8_8_and_1():
    model, x = net(), data()
    with torch.no_grad():
        _, var = of_groups(model[0](x))
    update_bn(x.split(SIZES), model)
    assert (model[1].running_var / var - 1).abs().max() > 0.2


class Deep(nn.Module):
    """Dropout, a norm that is used twice, one that is never, and one without positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.second, self.gnplus = nn.Conv2d(6, 6, 1), nk.GroupNormPlus(6, num_groups=2)
        self.unused = nn.BatchNorm2d(6)
        self.last, self.head = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.drop(torch.relu(self.bn(self.first(x))))
        x = torch.relu(self.gnplus(self.second(x)))
        return self.head(self.last(x.mean(dim=(2, 3))))


def inputs_of(model, x):
    """What the plain norms get in one forward."""
    seen, handles = {}, []
    for name in ("bn", "head"):
        layer = model.get_submodule(name)
        hook = lambda _, args, name=name: seen.update({name: args[0]})  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_one_pass_measures_what_training_gives_without_dropout():
    model, x = Deep(), data()
    batches = x.split([8, 9])
    patch = nk.recalibrate(model, batches)
    reference = Deep().train()
    reference.drop.eval()
    seen = [inputs_of(reference, batch) for batch in batches]
    rows = {row.name: row for row in patch.layers}
    assert list(rows) == ["bn", "gnplus", "head"]
    for name in ("bn", "head"):
        together = torch.cat([s[name] for s in seen])
        mean, var = of_groups(together, together.shape[1])
        assert_close(rows[name].new["running_mean"].double(), mean, **EXACT)
        assert_close(rows[name].new["running_var"].double(), var, **EXACT)
    assert [(left.name, left.why) for left in patch.left] == [("unused", "no batch has reached it")]


@pytest.mark.parametrize("sizes", [[8, 8, 1], [17], [1] * 17], ids=str)
def test_settled_layers_evaluate_exactly_what_was_measured(sizes):
    model, x = Deep(), data()
    nk.recalibrate(model, x.split(sizes), sequential=True).apply()
    seen = inputs_of(model.eval(), x)
    for name, values in seen.items():
        layer = model.get_submodule(name)
        mean, var = of_groups(values, layer.num_features)
        assert_close(layer.running_mean.double(), mean, **EXACT)
        assert_close(layer.running_var.double(), var, **EXACT)


class Shared(nn.Module):
    """One norm for inputs of two kinds, the second kind in some batches only."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        self.norm(input=x)
        if len(x) > 1:
            self.norm(x[:, :, 1:] * 2 + 5)


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
def test_all_calls_of_a_shared_layer_count(sequential):
    model, x = Shared(), data()
    patch = nk.recalibrate(model, x.split(SIZES), sequential=sequential)
    flat = [x.movedim(1, 0).flatten(1), (x[:16, :, 1:] * 2 + 5).movedim(1, 0).flatten(1)]
    together = torch.cat(flat, dim=1).double()
    assert_close(found(patch)[0].double(), together.mean(dim=1), **EXACT)
    assert_close(found(patch)[1].double(), together.var(dim=1), **EXACT)
    assert patch.layers[0].new["num_batches_tracked"] == 5
    assert patch.layers[0].num_values == together.shape[1]


def test_buffers_do_not_move_while_they_are_measured():
    model, seen = Deep(), []
    before = kept(model)
    moving = {name: dict(layer.named_buffers()) for name, layer in model.named_children()}
    model.last.register_forward_hook(
        lambda *_: seen.append(
            all(
                torch.equal(value, before[f"{name}.{key}"])
                for name, buffers in moving.items()
                for key, value in buffers.items()
            )
        )
    )
    for sequential in (False, True):
        nk.recalibrate(model, [data()] * 2, sequential=sequential)
    assert len(seen) > 4
    assert all(seen)


def test_estimates_of_micro_batches_stay_while_others_are_measured():
    """Training normalises by them, so what comes after does not depend on the batches."""
    model = nn.Sequential(
        nk.BatchChannelNorm(3, num_groups=1, micro_batch=True),
        nn.Conv2d(3, 2, 1),
        nn.BatchNorm2d(2),
    )
    x = data()
    with torch.no_grad():
        mean, var = of_groups(model[1](model[0].eval()(x)), 2)
    row = nk.recalibrate(model.train(), x.split(1)).layers[1]
    assert_close(row.new["running_mean"].double(), mean, **EXACT)
    assert_close(row.new["running_var"].double(), var, **EXACT)


def frozen_model():
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(4)), nk.BatchNorm(3, momentum=0.0))
    nk.freeze_statistics(model, lambda _, name: name == "0")
    model[1].eval()
    model[3].momentum = 0.0
    return model


def test_frozen_layers_keep_their_statistics_and_use_them():
    model, x = frozen_model(), data()
    patch = nk.recalibrate(model, [x], where=lambda _, name: name != "5")
    assert [row.name for row in patch.layers] == ["2"]
    reasons = {left.name: left.why for left in patch.left}
    assert "thaw_statistics" in reasons["0"]
    assert "evaluation mode inside a model in training mode" in reasons["1"]
    assert reasons["3"] == reasons["4"] == "its momentum is 0, so it is frozen"
    scale = (1 + 1e-5) ** -0.5  # twice by statistics of 0 and 1
    assert_close(found(patch)[0].double(), of_groups(x, 3)[0] * scale**2, **EXACT)
    rows = nk.recalibrate(model.eval(), [x]).layers
    assert [row.name for row in rows] == ["1", "2"]


def test_where_leaves_layers_out_and_other_classes_are_named():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x):
            return x

    class Odd(FrozenBatchNorm2d):
        pass

    Odd.__name__ = "Odd"
    model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(), Odd(), nn.BatchNorm2d(3))
    patch = nk.recalibrate(model, [data()], where=lambda _, name: name == "0")
    assert [(left.name, left.why) for left in patch.left] == [
        ("1", "its class keeps its statistics fixed"),
        ("2", "its class is no norm of torch and none of normkit"),
        ("3", "where= leaves it out"),
    ]
    with pytest.raises(nk.OptionError, match="can be measured; 0: its class keeps"):
        nk.recalibrate(nn.Sequential(FrozenBatchNorm2d()), [data()])


def test_a_subclass_that_reads_its_statistics_in_training_is_measured():
    class Renorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * self.running_var.sqrt().mean()

    patch = nk.recalibrate(Renorm(3), [data()])
    assert_close(found(patch)[1].double(), of_groups(data(), 3)[1], **EXACT)


def test_endless_batches_are_read_up_to_a_number():
    drawn = []

    def endless():
        for seed in itertools.count():
            drawn.append(seed)
            yield {"input": data(seed)[:4], "label": seed}, "of a form of its own"

    patch = nk.recalibrate(
        net(), endless(), forward=lambda model, batch: model(batch[0]["input"]), max_batches=5
    )
    assert drawn == list(range(5))
    assert patch.num_batches == patch.max_batches == 5
    assert "from 5 batches, in one pass" in str(patch)
    fewer = nk.recalibrate(net(), [data()] * 3, max_batches=5)
    assert "from 3 batches (at most 5 a rank), in one pass" in str(fewer)


def test_wrapped_and_compiled_models_are_measured_inside():
    torch.compiler.reset()
    x = data()
    expected = found(nk.recalibrate(net(), [x]))
    compiled = torch.compile(net(), backend="eager")
    compiled(x)
    inside = net()
    inside[1].compile(backend="eager")
    inside(x)
    for model in (compiled, inside, DataParallel(net())):
        patch = nk.recalibrate(model, [x])
        assert patch.layers[0].name == "1"
        for values, wanted in zip(found(patch), expected, strict=True):
            assert_close(values, wanted)
