"""What each kind of norm carries over and loses, against the formulas in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from convert.networks import timm, torchvision
from normkit.convert import Source, rule
from normkit.convert.rules import RULES
from normkit.layers.base import NormLayer

LAYERS = timm.layers
LayerNorm2d = torchvision.models.convnext.LayerNorm2d
FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d
ACT = {"act_layer": nn.SiLU}
FIXED = "without a gradient, as before (requires_grad=False): "


def sync_batch_norm_act():
    layer = LAYERS.norm_act.SyncBatchNormAct(6)
    layer.act, layer.drop = nn.SiLU(), nn.Identity()
    return layer


def trained(layer):
    """A layer in float64 whose parameters and buffers all differ from the defaults."""
    layer = layer.double()
    generator = torch.Generator().manual_seed(0)
    for value in [*layer.parameters(), *layer.buffers()]:
        if value.is_floating_point():
            draw = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            value.data.copy_(0.5 + draw)
    return layer


SAME = {  # the layer, the spec that computes the same, an input's shape
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6, eps=1e-3, momentum=0.3), "bn", (5, 6)),
    "BatchNorm1d, averaging": (lambda: nn.BatchNorm1d(6, momentum=None), "bn", (5, 6, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6, eps=1e-3), "bn", (4, 6, 5, 3)),
    "BatchNorm2d, plain": (lambda: nn.BatchNorm2d(6, affine=False), "bn", (4, 6, 5, 3)),
    "BatchNorm2d, untracked": (
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        "bn",
        (4, 6, 5, 3),
    ),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), "bn", (2, 6, 3, 2, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6), "in", (3, 6, 7)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), "in", (3, 6, 4, 5)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(6, eps=1e-2), "in", (2, 6, 3, 2, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6, eps=1e-3), "gn:3", (4, 6, 5, 3)),
    "GroupNorm, plain": (lambda: nn.GroupNorm(3, 6, affine=False), "gn:3", (4, 6, 5, 3)),
    "LayerNorm of tokens": (lambda: nn.LayerNorm(6, eps=1e-3), "pn", (4, 5, 6)),
    "LayerNorm of maps": (lambda: nn.LayerNorm(6), "pn", (4, 5, 3, 6)),
    "LayerNorm of vectors": (lambda: nn.LayerNorm(6), "ln", (4, 6)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), "pn", (4, 5, 6)),
    "torchvision LayerNorm2d": (lambda: LayerNorm2d(6, eps=1e-6), "pn", (4, 6, 5, 3)),
    "timm LayerNorm2d": (lambda: LAYERS.LayerNorm2d(6), "pn", (4, 6, 5, 3)),
    "timm LayerNormExp2d": (lambda: LAYERS.norm.LayerNormExp2d(6), "pn", (4, 6, 5, 3)),
    "timm LayerNorm": (lambda: LAYERS.LayerNorm(6), "pn", (4, 5, 6)),
    "timm LayerNormFp32": (lambda: LAYERS.LayerNormFp32(6), "pn", (4, 5, 6)),
    "timm LayerNorm2dFp32": (lambda: LAYERS.LayerNorm2dFp32(6), "pn", (4, 6, 5, 3)),
    "timm GroupNorm": (lambda: LAYERS.GroupNorm(6, 3), "gn:3", (4, 6, 5, 3)),
    "timm GroupNorm1": (lambda: LAYERS.GroupNorm1(6), "gn:1", (4, 6, 5, 3)),
    "timm BatchNormAct2d": (lambda: LAYERS.BatchNormAct2d(6, **ACT), "bn", (4, 6, 5, 3)),
    "timm GroupNormAct": (lambda: LAYERS.GroupNormAct(6, 3, **ACT), "gn:3", (4, 6, 5, 3)),
    "timm GroupNorm1Act": (lambda: LAYERS.GroupNorm1Act(6, **ACT), "gn:1", (4, 6, 5, 3)),
    "timm LayerNormAct": (lambda: LAYERS.LayerNormAct(6, **ACT), "pn", (4, 5, 6)),
    "timm LayerNormActFp32": (lambda: LAYERS.LayerNormActFp32(6, **ACT), "pn", (4, 5, 6)),
    "timm LayerNormAct2d": (lambda: LAYERS.LayerNormAct2d(6, **ACT), "pn", (4, 6, 5, 3)),
    "timm LayerNormAct2dFp32": (
        lambda: LAYERS.LayerNormAct2dFp32(6, **ACT),
        "pn",
        (4, 6, 5, 3),
    ),
}
AT_EVALUATION = {
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(6, eps=1e-3), "bn", (4, 6, 5, 3)),
    "timm SyncBatchNormAct": (sync_batch_norm_act, "bn", (4, 6, 5, 3)),
    "InstanceNorm2d, tracked": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        "in",
        (4, 6, 5, 3),
    ),
    "FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(6, eps=1e-3), "bn", (4, 6, 5, 3)),
    "timm FrozenBatchNormAct2d": (
        lambda: LAYERS.FrozenBatchNormAct2d(6, **ACT),
        "bn",
        (4, 6, 5, 3),
    ),
}


def both(make, spec):
    layer = trained(make())
    return layer, nk.convert_norm(layer, spec)


def inputs(shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tolerance(layer):
    rounds = "Fp32" in type(layer).__name__  # computes in float32 whatever comes in
    return {"rtol": 1e-4, "atol": 1e-4} if rounds else {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize(
    ("make", "spec", "shape"), (SAME | AT_EVALUATION).values(), ids=[*SAME, *AT_EVALUATION]
)
def test_the_same_norm_computes_the_same_at_evaluation(make, spec, shape):
    old, done = both(make, spec)
    x = inputs(shape)
    assert isinstance(done.model, NormLayer)
    assert_close(done.model.eval()(x), old.eval()(x), **tolerance(old))


@pytest.mark.parametrize(("make", "spec", "shape"), SAME.values(), ids=list(SAME))
def test_the_same_norm_computes_the_same_in_training(make, spec, shape):
    old, done = both(make, spec)
    new, x = done.model, inputs(shape)
    assert_close(new(x), old(x), **tolerance(old))
    gradients = []
    for layer in (new, old):
        leaf = x.clone().requires_grad_()
        layer(leaf).mul(inputs(shape)).square().sum().backward()
        gradients.append(leaf.grad)
    assert_close(*gradients, **tolerance(old))
    for name, parameter in old.named_parameters():
        assert_close(new.get_parameter(name).grad, parameter.grad, **tolerance(old))
    assert_close(new.eval()(x), old.eval()(x), **tolerance(old))  # buffers moved alike


@pytest.mark.parametrize("make", [row[0] for row in SAME.values()], ids=list(SAME))
def test_the_names_of_a_state_dict_stay(make):
    old, done = both(make, "gn:1")
    new = done.model.state_dict()
    kept = [name for name in old.state_dict() if name in new]
    assert kept == [n for n in old.state_dict() if "running" not in n and "tracked" not in n]


@pytest.mark.parametrize(
    "spec",
    [
        "in",
        "ln",
        "gn:3",
        "pn",
        "bgn:1",
        "ghost:2",
        "gbgn:3",
        "gnplus:3",
        "bcn:3",
        "bcn:3:channel_affine=channel",
        "sn",
        "gw:3",
        "ibn",
    ],
)
def test_every_norm_is_read_and_written(spec):
    """There and back, by way of the spec; what a layer has no place for is reported."""
    old = trained(nn.BatchNorm2d(6, eps=1e-3, momentum=0.3))
    there = nk.convert_norm(old, spec)
    back = nk.convert_norm(there.model, "bn")
    assert_close(back.model.weight, old.weight)
    assert_close(back.model.bias, old.bias)
    assert back.model.eps == old.eps
    carried = {*there.changes[0].carried, *back.changes[0].carried}
    lost = {*there.changes[0].lost, *back.changes[0].lost}
    assert ("running statistics" in lost) != torch.equal(back.model.running_var, old.running_var)
    assert {"weight", "bias"} <= carried
    assert there.model(inputs((4, 6, 5, 3))).isfinite().all()


def test_what_only_a_composite_has_is_lost_by_name():
    assert lost_of(nk.GroupNormPlus(6, num_groups=3)) == ("running statistics", "mix_logit")
    assert lost_of(nk.SwitchableNorm(6)) == ("mean_logits", "var_logits")
    assert lost_of(nk.BatchChannelNorm(6, num_groups=3)) == ("channel.weight", "channel.bias")
    assert lost_of(nk.InstanceBatchNorm(6)) == ("running statistics",)
    assert lost_of(nk.BatchGroupNorm(6, num_groups=2)) == ("running statistics",)
    assert lost_of(nk.BatchGroupNorm(6, num_groups=6)) == ()


def lost_of(layer):
    (change,) = nk.convert_norm(layer, "bn").changes
    return tuple(sorted(change.lost, key=lambda name: name != "running statistics"))


def test_statistics_of_the_groups_output_are_not_those_of_the_input():
    old = trained(nn.BatchNorm2d(6))
    first = nk.convert_norm(old, "gnplus:3")
    assert first.changes[0].lost == ("running statistics",)
    assert torch.equal(first.model.running_mean, torch.zeros(6, dtype=torch.float64))
    parallel = nk.convert_norm(old, "gnplus:3:order=parallel").model
    assert torch.equal(parallel.running_mean, old.running_mean)
    assert parallel.running_mean is not old.running_mean


def test_halves_take_the_values_of_their_channels():
    old = trained(nn.BatchNorm2d(7))
    new = nk.convert_norm(old, "ibn").model
    x = inputs((4, 7, 5, 3))
    expected = old.eval()(x)[:, 3:]
    assert_close(new.eval()(x)[:, 3:], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(new.instance.bias, old.bias[:3])
    again = nk.convert_norm(new, "gn:1").model
    assert torch.equal(again.weight, old.weight)


def test_a_layer_of_the_same_class_keeps_all_that_it_learned():
    old = trained(nk.BatchChannelNorm(6, num_groups=3))
    new = nk.convert_norm(old, "bcn:3:eps=0.001").model
    assert new.eps == 1e-3
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name
    halves = trained(nk.InstanceBatchNorm(6))
    found = nk.convert_norm(halves, "ibn:momentum=0.5").model
    for name, value in halves.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_a_composite_keeps_the_options_that_the_spec_leaves_open():
    old = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True, update_rate=0.02)
    new = nk.convert_norm(old, "bcn:2").model
    assert (new.num_groups, new.micro_batch, new.update_rate) == (2, True, 0.02)


def test_options_are_carried_unless_the_spec_says_otherwise():
    old = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)
    carried = nk.convert_norm(old, "ghost:2")
    assert (carried.model.eps, carried.model.momentum) == (1e-3, 0.01)
    assert "eps=0.001" in carried.changes[0].carried
    assert "momentum=0.01" in carried.changes[0].carried
    assert nk.convert_norm(old, "ghost:2:eps=0.1").model.eps == 0.1
    assert nk.convert_norm(old, "gn:2").model.momentum == 0.1  # of statistics that it has not
    plain = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    assert nk.convert_norm(plain, "ghost:2").model.running_mean is None
    assert nk.convert_norm(plain, "gn:2").model.weight is None
    assert nk.convert_norm(plain, "gn:2:affine").model.weight is not None
    weighed = nk.BatchNorm(6, example_weight=0.3)
    assert nk.convert_norm(weighed, "ghost:2").model.example_weight == 0.3
    assert nk.convert_norm(weighed, "gn:2:track_running_stats").model.example_weight == 1


def test_a_spec_without_affine_loses_the_weights():
    done = nk.convert_norm(nn.BatchNorm2d(6), "gn:2:affine=false")
    assert done.model.weight is None
    assert done.changes[0].lost == ("weight", "bias", "running statistics")


def test_frozen_values_become_parameters_that_do_not_learn():
    old = trained(FrozenBatchNorm2d(6))
    done = nk.convert_norm(old, "gn:2")
    assert torch.equal(done.model.weight, old.weight)
    assert [p.requires_grad for p in done.model.parameters()] == [False, False]
    assert done.changes[0].warnings == (FIXED + "weight, bias",)
    (change,) = nk.convert_norm(old, "bcn:2").changes
    assert change.warnings == (
        "its statistics were fixed; training updates those of the new layer, unless .eval()",
        FIXED + "batch.weight, batch.bias, channel.weight, channel.bias",
    )


def test_a_detectron_style_copy_is_known_by_its_buffers():
    class FrozenBatchNorm2d(nn.Module):  # without eps, as in many detection projects
        def __init__(self, buffers=("weight", "bias", "running_mean", "running_var")):
            super().__init__()
            for name in buffers:
                self.register_buffer(name, torch.ones(6))

    model = nn.Sequential(FrozenBatchNorm2d())
    assert nk.convert_norm(model, "bn").model[0].eps == 1e-5
    other = nn.Sequential(FrozenBatchNorm2d(("weight", "bias")))
    with pytest.raises(nk.ConversionError, match="FrozenBatchNorm2d has no rule"):
        nk.convert_norm_(other, "bn")


def test_activation_and_drop_are_the_same_modules():
    old = LAYERS.BatchNormAct2d(6, act_layer=nn.PReLU, drop_layer=nn.Dropout2d)
    old.drop.eval()
    done = nk.convert_norm_(old, "gn:2")
    assert done.model.act is old.act
    assert done.model.drop is old.drop
    assert (done.model.training, done.model.drop.training) == (True, False)
    assert done.changes[0].carried == ("weight", "bias", "drop Dropout2d", "activation PReLU")
    assert repr(done.model).endswith("-> drop Dropout2d, activation PReLU")
    again = nk.convert_norm_(done.model, "bcn:2")
    assert again.model.act is old.act
    assert type(again.model).__name__ == "BatchChannelNormAct"


def test_it_drops_before_it_activates():
    class Shift(nn.Module):
        def forward(self, x):
            return x - 0.5

    old = trained(LAYERS.BatchNormAct2d(6, drop_layer=Shift, **ACT))
    x = inputs((4, 6, 5, 3))
    new = nk.convert_norm(old, "bn").model
    assert_close(new(x), old(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_adapted_layers_can_be_copied_and_pickled(copied):
    model = nn.Sequential(LAYERS.BatchNormAct2d(6, **ACT), LAYERS.LayerNormAct(3, **ACT)).double()
    model = nk.convert_norm(model, {"0": "bgn:3", "1": "pn"}).model
    x = inputs((4, 6, 5, 3))
    twin = copied(model)
    assert_close(twin(x), model(x))
    assert type(twin[1]) is type(model[1])
    assert type(twin[1]).__name__ == "PositionalNormChannelsLastAct"
    assert twin[0].weight is not model[0].weight
    assert nk.set_example_weight(twin, 0.1) == ("0",)


def test_an_adapted_layer_compiles():
    model = nk.convert_norm(LAYERS.BatchNormAct2d(6, **ACT), "gn:2").model.double()
    x = inputs((4, 6, 5, 3))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(x), model(x))


def test_a_rule_of_ones_own():
    class Doubled(nn.BatchNorm2d):
        pass

    try:

        @rule(Doubled)
        def read(layer):
            return Source(num_features=layer.num_features, weight=layer.weight, bias=layer.bias)

        layer = Doubled(6)
        assert nk.convert_norm(layer, "gn:2").model.num_features == 6
        with pytest.raises(nk.ConversionError, match=r"Doubled has a rule already: .*read"):
            rule(Doubled)(read)
    finally:
        RULES.pop(f"{Doubled.__module__}.{Doubled.__qualname__}", None)


def test_16_bit_statistics_become_wide():
    old = nn.BatchNorm2d(6).bfloat16()
    old.running_mean += 3
    new = nk.convert_norm(old, "bn").model
    assert new.weight.dtype == torch.bfloat16
    assert new.running_mean.dtype == torch.float32
    assert new.running_mean.eq(3).all()


def test_device_and_dtype_are_those_of_the_old_layer():
    old = nn.BatchNorm2d(6, device="meta", dtype=torch.float64)
    for spec in ("bn", "bcn:2", "ibn", "sn"):
        new = nk.convert_norm(old, spec).model
        assert {str(t.device) for t in new.state_dict().values()} == {"meta"}
        assert {p.dtype for p in new.parameters()} == {torch.float64}
    bare = nn.Sequential(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6)).double()
    assert nk.convert_norm(bare, "gn:2:affine").model[1].weight.dtype == torch.float64
