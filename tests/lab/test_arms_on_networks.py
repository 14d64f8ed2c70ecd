"""Arms on networks that have no place for them, and on networks of the user's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

import normkit as nk
from normkit.lab.check import check
from normkit.lab.models import apply_arm, build_model
from normkit.lab.models.build import norm_slots, slots_of
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.train import run

NET = "small-resnet:blocks=2"


def build(arm, name):
    return build_model(name, num_classes=10, input_shape=(3, 16, 16), norm=arm)


# --- refused before anything is trained ---


@pytest.mark.parametrize(
    ("arm", "name", "message"),
    [
        (
            "xbn/gn:8",
            "mlp:depth=2:width=8",
            "xbn/gn:8 replaces one norm of each residual block; ch",
        ),
        ("xbn-p3/gn:8", NET, "position=3 was given, but the blocks .* choose one of"),
        ("xbn-d9/gn:8", NET, "every=9 was given, but the model has 4 blocks .* choose at most 4"),
        ("xbn/gn:7", NET, "(?s:.*)7 groups do not divide"),
        (
            "gnbn/gn:4",
            "mlp:depth=1:width=8",
            "gnbn/gn:4 replaces every other norm of a stack; choos",
        ),
        ("ibn-b", NET, "ibn-b stands where IBN-Net-b .* after the sums .* needs at least 3 stages"),
        ("none+ws", "mlp", r"\+ws has nothing to standardise in model 'mlp'.*leave \+ws out"),
        ("bn+cwn", "mlp", r"\+cwn has nothing to standardise in model 'mlp'"),
    ],
)
def test_a_network_without_places_for_an_arm_is_refused(arm, name, message):
    with pytest.raises(nk.SpecError, match=message):
        build(arm, name)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        # the second stage's maps have one position, on which `in` has a single value
        (
            "ibn-b",
            r"ibn-b stands where .*InstanceNorm expected more than 1 value .*\(2, 128, 1, 1\)",
        ),
        ("xbn/in", r"norm xbn/in does not fit layer 'layer2.0.bn2' at batch size 2: "),
        ("gnbn/in", r"norm gnbn/in does not fit layer '.*' at batch size 2: "),
    ],
)
def test_an_arm_is_tried_at_all_of_its_places(arm, message):
    slots = norm_slots("torchvision:resnet18", 10, (3, 8, 8))
    for _ in range(2):
        with pytest.raises(nk.SpecError, match=message):
            slots.check(arm, 2, 2)
    slots.check("bn", 2, 2)


def test_frozen_bn_and_none_fit_a_single_example():
    slots = norm_slots("torchvision:resnet18", 10, (3, 8, 8))
    with pytest.raises(nk.SpecError, match=r"norm bn does not fit layer .* at batch size 1"):
        slots.check("bn", 1, 1)
    slots.check("frozen-bn", 1, 1)
    slots.check("none", 1, 1)


def test_a_sweep_refuses_an_arm_before_the_first_run():
    protocol = Protocol(model="mlp:depth=3:width=8", limit=40, epochs=1)
    for arm, message in (
        ("ibn-a", "ibn-a stands where IBN-Net-a has it"),
        ("gnbn/gn:4+ws", r"\+ws has nothing to standardise"),
        ("gnbn/gn:8", "gnbn/gn:8 does not fit layer '2' at batch size 10"),  # one value a group
    ):
        with pytest.raises(nk.SpecError, match=message):
            check(SweepSpec(protocol=protocol, norms=("bn", arm), batch_sizes=(10,), seeds=(1,)))


@pytest.mark.parametrize("arm", ["none", "frozen-bn", "xbn/gn:4", "gnbn/gn:4+cwn", "ibn"])
def test_a_run_has_an_arm_for_its_norm(arm):
    protocol = Protocol(model="small-resnet:width=8", limit=40, epochs=1)
    record = run(TrainingSpec(protocol=protocol, norm=arm, batch_size=10))
    assert record.outcome.status == "finished", record.outcome.message
    names = ["1", "3.norm1", "3.norm2", "4.norm1", "4.norm2"]
    assert [place.name for place in record.outcome.norms] == names


# --- networks of the user's own ---


class Tokens(nn.Module):
    """A small vision transformer: layer norms over the last axis, and no batch norm."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, 4)
        self.norm1, self.mix, self.norm2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = x + self.mix(self.norm1(x))
        return self.head(self.norm2(x).mean(1))


def applied(model, arm):
    return apply_arm(model, arm, batch_size=4, input_shape=(3, 16, 16), name="mine")


def test_a_norm_throughout_replaces_the_norms_of_a_transformer():
    built = applied(Tokens(), "gn:4")
    assert [(p.name, p.norm, p.num_positions) for p in built.norms] == [
        ("norm1", "gn:4", 16),
        ("norm2", "gn:4", 16),
    ]
    x = torch.randn(2, 16, 8)  # channels last
    torch.testing.assert_close(
        built.model.norm1(x), functional.group_norm(x.transpose(1, 2), 4).transpose(1, 2)
    )
    assert applied(Tokens(), "none").model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    slots = slots_of(Tokens(), input_shape=(3, 16, 16), name="mine")
    slots.check("bgn:16", 4, 4)
    with pytest.raises(nk.SpecError, match="norm gn:3 does not fit layer 'norm1' at batch size 4"):
        slots.check("gn:3", 4, 4)


@pytest.mark.parametrize("arm", ["xbn/gn:4", "ibn-a", "ibn-b", "gnbn/gn:4", "frozen-bn"])
def test_arms_that_change_batch_norms_need_them(arm):
    model = Tokens().eval()
    state, modules = model.state_dict(), dict(model.named_modules())
    said = f"{arm} changes batch norms, but model 'mine' has none, only LayerNorm; choose a norm "
    with pytest.raises(nk.SpecError, match=said):
        applied(model, arm)
    assert model.state_dict().keys() == state.keys()
    assert all(dict(model.named_modules())[name] is m for name, m in modules.items())
    assert not model.training


def test_only_the_batch_norms_of_a_mixed_network_are_replaced_but_none_removes_all():
    def mixed():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))

    built = applied(mixed(), "gn:4")
    assert [type(m) for m in built.model] == [nn.Conv2d, nk.GroupNorm, nn.GroupNorm]
    assert [place.name for place in built.norms] == ["1"]
    assert [type(m) for m in applied(mixed(), "none").model] == [nn.Conv2d, *[nn.Identity] * 2]


def test_a_network_is_left_in_its_mode_and_with_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()).eval()
    model[1].running_mean.fill_(2.0)
    before = torch.get_rng_state()
    applied(model, "bn")
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[1].running_mean, torch.full((8,), 2.0))
    assert model[1].num_batches_tracked == 0
    assert torch.equal(before, torch.get_rng_state())


class NeedsItsNorm(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / self[1].num_features


def test_a_forward_that_needs_its_norms_is_refused_and_left_whole():
    model = NeedsItsNorm(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(
        nk.SpecError, match=r"none leaves model 'mine' without norms, which .*num_features.*choose"
    ):
        applied(model, "none")
    assert isinstance(model[1], nn.BatchNorm2d)


def test_a_norm_out_of_sight_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.spare = [nn.BatchNorm2d(8)]
    with pytest.raises(nk.SpecError, match=r"none removes .* spare of model 'mine' holds one in a"):
        applied(model, "none")


def test_a_failing_arm_leaves_the_network_whole(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    model = build(None, "torchvision:resnet18").model
    modules = dict(model.named_modules())
    with pytest.raises(nk.PartitionError, match="7 groups do not divide"):
        applied(model, "gn:7+ws")
    monkeypatch.setattr("normkit.lab.arms.reparametrize_", stop)
    with pytest.raises(KeyboardInterrupt):  # after the sums have got their norms
        applied(model, "ibn-b+ws")
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[name] is module for name, module in modules.items())
    assert not any(map(is_parametrized, model.modules()))
