"""Conversion transfers what takes effect: buffers, not flags; shapes, not stated numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from convert.networks import timm, torchvision

FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d
FrozenBatchNormAct2d = timm.layers.FrozenBatchNormAct2d
CHANGING = ["gn:2", "in", "ln", "bcn:2", "ibn", "sn", "gnplus:2", "ghost:2", "gbgn:2", "bgn:2"]


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def moved(norm):
    """The norm after a batch that is not standard."""
    norm.train()(3 * data(8, 8, 4, 4) + 1)
    return norm


@pytest.mark.parametrize("spec", CHANGING)
@pytest.mark.parametrize("eps", [0.0, 1e-30])
@pytest.mark.parametrize(
    "make", [lambda eps: nn.BatchNorm2d(8, eps=eps), lambda eps: FrozenBatchNorm2d(8, eps=eps)]
)
def test_an_eps_near_0_is_not_carried_to_other_deviations(make, eps, spec):
    done = nk.convert_norm(make(eps), spec)
    assert f"eps={eps}" in done.changes[0].lost
    for dtype in (torch.float32, torch.float16):
        layer = copy.deepcopy(done.model).to(dtype).train()
        x = torch.full((4, 8, 3, 3), 2.5, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        assert layer.eval()(x).isfinite().all()


def test_an_eps_near_0_stays_where_the_function_does():
    x = data(4, 8, 3, 3)
    for old, spec in ((nn.GroupNorm(2, 8, eps=0), "gn:2"), (nn.BatchNorm2d(8, eps=0), "bn")):
        done = nk.convert_norm(old.eval(), spec)
        assert done.model.eps == 0
        assert_close(done.model(x), old(x))
        said = "eps=0: a group without variance gives NaN in training"
        assert said in done.changes[0].warnings
    kept = nk.convert_norm(nn.LayerNorm(8, eps=1e-12), "ln").model  # as BERT has it
    assert kept.eps == 1e-12


@pytest.mark.parametrize("spec", ["bgn:2", "gnplus:2"])
def test_a_momentum_of_0_is_not_carried_to_statistics_that_start_anew(spec):
    old = moved(nn.BatchNorm2d(8, momentum=0))
    done = nk.convert_norm(old, spec)
    assert "momentum=0" in done.changes[0].lost
    moved(done.model)
    assert not torch.equal(done.model.running_mean, torch.zeros_like(done.model.running_mean))
    assert nk.convert_norm(old, "ghost:2").model.momentum == 0
    for momentum in (1.0, None):
        layer = nk.convert_norm(nn.BatchNorm2d(8, momentum=momentum), spec).model
        assert layer.momentum == momentum


def test_statistics_that_start_anew_are_not_still():
    old = moved(nn.BatchNorm2d(8))
    old.track_running_stats = False
    (change,) = nk.convert_norm(old, "bgn:2").changes
    said = "training did not update its running statistics, but updates the new layer's"
    assert change.warnings == (said,)


def test_a_flag_without_buffers_is_no_tracking():
    old = nn.BatchNorm2d(8, track_running_stats=False)
    old.track_running_stats = True
    new = nk.convert_norm(old, "bn").model
    assert new.running_mean is None
    x = data(4, 8, 3, 3)
    assert_close(new.eval()(x), old.eval()(x))


def test_an_instance_norm_that_was_switched_off_goes_by_the_example():
    old = moved(nn.InstanceNorm2d(8, track_running_stats=True))
    old.track_running_stats = False
    new = nk.convert_norm(old, "in").model
    x = data(4, 8, 3, 3)
    assert_close(new.eval()(x), copy.deepcopy(old).eval()(x))


@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")])
def test_parameters_that_were_taken_away_are_not_put_back_in_silence(names):
    old = moved(nn.BatchNorm2d(8))
    for name in names:
        setattr(old, name, None)
    done = nk.convert_norm(old, "bn")
    x = data(4, 8, 3, 3)
    assert_close(done.model.eval()(x), old.eval()(x))
    gained = [n for n in names if getattr(done.model, n) is not None]
    told = [w for w in done.changes[0].warnings if "gets one" in w]
    assert len(told) == len(gained)
    if len(names) == 2:
        assert gained == []


def test_the_number_of_channels_is_that_of_the_values():
    old = nn.BatchNorm2d(8)
    for name in ("weight", "bias"):
        setattr(old, name, nn.Parameter(torch.ones(6)))
    for name in ("running_mean", "running_var"):
        setattr(old, name, torch.ones(6))
    new = nk.convert_norm(old, "bn").model
    x = data(4, 6, 3, 3)
    assert_close(new.eval()(x), old.eval()(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FrozenBatchNorm2d(8),
        lambda: FrozenBatchNormAct2d(8),
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.InstanceNorm2d(8),
        lambda: nk.GroupNorm(8, num_groups=2),
    ],
    ids=["torchvision", "timm", "groups", "instance", "ours"],
)
def test_a_flag_that_meant_nothing_gives_way_to_the_parents_mode(make):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make()).eval()
    model[1].train()  # as it is when somebody puts the layer in afterwards
    nk.convert_norm_(model, "bn")
    assert not model[1].training
    model = nn.Sequential(make().eval())
    nk.convert_norm_(model, "bn")
    assert model[0].training


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(8), lambda: nk.BatchNorm(8)])
def test_a_flag_that_means_something_stays(make):
    model = nn.Sequential(make().eval())
    nk.convert_norm_(model, "gn:2")
    assert not model[0].training


def test_frozen_statistics_are_said_to_move_only_where_there_are_some():
    old = FrozenBatchNorm2d(8)
    said = "its statistics were fixed; training updates those of the new layer, unless .eval()"
    assert said in nk.convert_norm(old, "bn").changes[0].warnings
    assert said not in nk.convert_norm(old, "gn:2").changes[0].warnings


def test_parameters_that_do_not_learn_are_said():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    done = nk.convert_norm_(model, "gn:2")
    said = "without a gradient, as before (requires_grad=False): "
    assert [c.warnings for c in done.changes] == [(f"{said}weight, bias",), (f"{said}bias",), ()]
    assert f"  0: {said}weight, bias" in str(done).splitlines()


def test_values_that_are_half_on_the_meta_device_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(8))
    model[0].running_mean = torch.empty(8, device="meta")
    with pytest.raises(nk.ConversionError, match="0 to bn: some of its values are on the meta dev"):
        nk.convert_norm_(model, "bn")


@pytest.mark.parametrize("verb", ["convert_norm_", "convert_norm"])
def test_what_is_made_in_inference_mode_can_be_trained(verb):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.inference_mode():
        done = getattr(nk, verb)(model, "bcn:2+ws", calibrate=[data(4, 3, 6, 6)])
    done.model.train()(data(4, 3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None for p in done.model.parameters())


@pytest.mark.parametrize("spec", ["bn", "ghost:2", "bcn:2", "ibn"])
def test_statistics_that_were_switched_off_stay_and_stand_still(spec):
    old = moved(nn.BatchNorm2d(8))
    old.track_running_stats = False
    done = nk.convert_norm(old, spec)
    assert {"running statistics", "track_running_stats=False"} <= {*done.changes[0].carried}
    before = copy.deepcopy(done.model.state_dict())
    moved(done.model)
    for name, value in done.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_norm_that_was_switched_off_evaluates_and_trains_as_torchs():
    old = moved(nn.BatchNorm2d(8))
    old.track_running_stats = False
    new = nk.convert_norm(old, "bn").model
    x = data(4, 8, 3, 3)
    for mode in (True, False):
        assert_close(new.train(mode)(x), old.train(mode)(x))
    again = nk.convert_norm(new, "bn:eps=0.001").model  # ours is read likewise
    assert_close(again.running_mean, old.running_mean)
    assert again.track_running_stats is False


def test_synchronizing_keeps_statistics_that_were_switched_off():
    model = nn.Sequential(moved(nn.BatchNorm2d(8)))
    model[0].track_running_stats = False
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    nk.synchronize_(model)
    model.train()(data(4, 8, 3, 3))
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
