"""Activations and sums of a model put into its norms, and taken out again."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.testing import assert_close

import normkit as nk
from convert.networks import WITH_BATCH_NORM, build, images
from normkit.errors import ConversionError


class Block(nn.Module):
    """A residual block with one activation module in several places."""

    def __init__(self, norm=nn.BatchNorm2d, act=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.act(y)


class Written(nn.Module):
    """A forward that is given as a function."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nk.BatchNorm(4)
        for name, module in modules.items():
            setattr(self, name, module)
        kind = type("Written", (type(self),), {"forward": forward})
        self.__class__ = kind


def batch(seed=0):
    return torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(seed)).double()


def state_of(model):
    """Every module with its class, mode, children and activation, and where everything is."""
    return {
        name: (
            id(m), type(m), m.training, list(m._modules), getattr(m, "activation", None),
            {k: id(v) for k, v in (*m._parameters.items(), *m._buffers.items())},
        )
        for name, m in model.named_modules()
    }  # fmt: skip


def step(model, x):
    """Output, gradients and buffers of one training step."""
    model.train()
    torch.manual_seed(0)  # dropout
    y = model(x)
    y.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    return [y.detach(), *gradients, *(b.clone() for b in model.buffers())]


def require_alike(old, new, error=1e-10):
    for theirs, ours in zip(old, new, strict=True):
        largest = max(1.0, theirs.double().abs().max().item())
        assert_close(ours.double(), theirs.double(), atol=error * largest, rtol=error)


def fused_as(model, x, **expected):
    """The model fused, after a check that it trains as before and comes back as it was."""
    model = model.double()
    before, plain = state_of(model), copy.deepcopy(model)
    keys = list(model.state_dict())
    done = nk.fuse_activations_(model, x)
    assert {f.name: (f.activation, f.residual, f.how) for f in done.fused} == expected
    assert list(model.state_dict()) == keys
    fused = state_of(model)
    again = nk.fuse_activations_(model, x)
    assert not again.fused
    assert again.revert() is model
    assert state_of(model) == fused
    require_alike(step(plain, x), step(model, x))
    require_alike([plain.eval()(x)], [model.eval()(x)])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(done.model))) if is_known(model) else model
    require_alike([plain(x)], [copied.eval()(x)])
    assert done.revert() is model
    model.train()
    assert state_of(model) == before
    done.revert()
    assert state_of(model) == before
    require_alike(step(plain, x), step(model, x))
    return done


def is_known(model):
    return not isinstance(model, Written)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nk.BatchNorm, lambda c: nn.GroupNorm(2, c)])
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.Hardswish()]
)
def test_a_block_with_one_activation_in_several_places_is_rewritten(norm, act):
    name = {"LeakyReLU": "leaky_relu"}.get(type(act).__name__, type(act).__name__.lower())
    expected = {"bn1": (name, False, "rewritten"), "bn2": (name, True, "rewritten")}
    fused_as(Block(norm, act), batch(), **expected)


@pytest.mark.parametrize(
    "norm",
    [nk.PositionalNorm, nk.SwitchableNorm, lambda c: nk.BatchChannelNorm(c, num_groups=2)],
    ids=["positional", "switchable", "batch-channel"],
)
def test_composites_and_norms_of_positions_go_on_too(norm):
    expected = {"bn1": ("silu", False, "rewritten"), "bn2": ("silu", True, "rewritten")}
    fused_as(Block(norm, nn.SiLU()), batch(), **expected)


def test_a_sequence_gets_identities():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.Softplus(), nn.Conv2d(4, 4, 1),
        nn.InstanceNorm2d(4, affine=True), nn.Identity(), nn.Tanh(),
    )  # fmt: skip
    done = fused_as(model, batch(), **{"5": ("tanh", False, "nn.Identity")})
    assert [(each.name, each.why) for each in done.left] == [
        ("1", "no activation follows where it is called")
    ]


def in_place(self, x):
    y = self.conv(x)
    y += self.norm(x)
    return y.relu()


FORWARDS = {
    "a function": (lambda self, x: F.relu(self.norm(self.conv(x)), inplace=True), ("relu", False)),
    "a method": (lambda self, x: self.norm(self.conv(x)).relu_(), ("relu", False)),
    "a slope": (lambda self, x: F.leaky_relu(self.norm(x), 0.3), ("leaky_relu", False)),
    "add": (lambda self, x: torch.add(x, self.norm(self.conv(x))).relu(), ("relu", True)),
    "a shortcut first": (
        lambda self, x: torch.sigmoid(self.conv(x) + self.norm(x)),
        ("sigmoid", True),
    ),
    "in place": (in_place, ("relu", True)),
    "a shortcut later": (lambda self, x: F.silu(self.norm(x) + self.conv(x)), ("silu", True)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_are_rewritten(name):
    forward, (activation, residual) = FORWARDS[name]
    fused_as(Written(forward), batch(), norm=(activation, residual, "rewritten"))


def used_twice(self, x):
    y = self.norm(self.conv(x))
    return y.relu() + y


def in_training(self, x):
    y = self.norm(self.conv(x))
    return F.dropout(y.relu(), 0.5, self.training)


def with_option(self, x, scale=1.0):
    return self.norm(self.conv(x)).relu() * scale


def asks(self, x):
    return self.norm(self.conv(x if isinstance(x, torch.Tensor) else x[0])).relu()


def decides(self, x):
    return self.norm(x).relu() if x.sum() > 0 else x


def called_twice(self, x):
    return self.norm(self.norm(self.conv(x)).relu()).relu()


def added_in_place(self, x):
    x += self.norm(self.conv(x))
    return x.relu()


def added_by_a_method(self, x):
    return self.conv(x).add_(self.norm(x)).relu()


def used_again(self, x):
    y = z = self.conv(x)
    y += self.norm(x)
    return y.relu() + z


def something_between(self, x):
    return self.drop(self.norm(self.conv(x))).relu()


def written_between(self, x):
    z = self.conv(x)
    y = self.norm(z)
    w = z.mul_(2)
    return y.relu() + w


def a_number(self, x):
    return (self.norm(self.conv(x)) + 1).relu()


def seen_in_training(self, x):
    y = self.norm(self.conv(x))
    return self.act(y) + y.mean() if self.training else self.act(y)


def activated_twice_in_training(self, x):
    z = self.act(self.norm(self.conv(x)))
    return z + self.act(self.conv(x)) if self.training else z


def with_a_shortcut_out(self, x, raw=False):
    y = self.norm(self.conv(x))
    return y if raw else self.act(y)


def by_the_type(self, x):
    y = self.norm(self.conv(x))
    return y if isinstance(x, torch.Tensor) else self.act(y)


REFUSED = {
    seen_in_training: "differs between training and evaluation",
    activated_twice_in_training: "differs between training and evaluation",
    with_a_shortcut_out: "optional arguments",
    by_the_type: "depends on the types of its inputs",
    used_twice: "used in 2 places",
    in_training: "differs between training and evaluation",
    with_option: "optional arguments",
    asks: "depends on the types of its inputs",
    decides: "cannot trace",
    called_twice: "called in several places",
    added_in_place: "may change, in place, a map",
    added_by_a_method: "added in place to another map",
    used_again: "may change, in place, a map",
    something_between: "no activation follows|comes between",
    written_between: "may write to a map that the norm reads",
    a_number: "a number, or the result itself, is added",
}


def dropped_behind(self, x):
    return F.dropout(self.act(self.norm(self.conv(x))), 0.5, self.training)


def test_a_difference_in_training_behind_the_activation_does_no_harm():
    model = Written(dropped_behind, act=nn.ReLU())
    fused_as(model, batch(), norm=("relu", False, "nn.Identity"))


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_be_put_together_stays_with_the_reason(forward):
    model = Written(forward, drop=nn.Dropout(0.5), act=nn.ReLU()).double()
    before = state_of(model)
    done = nk.fuse_activations_(model, batch())
    assert done.fused == ()
    assert state_of(model) == before
    assert len(done.left) == 1
    assert re.search(REFUSED[forward], done.left[0].why)
    assert done.left[0].why in str(done)


class Mixed(nn.Module):
    """A sum of two maps of one shape, and one of two maps that torch broadcasts."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.pool, self.act = nn.AdaptiveAvgPool2d(1), nn.ReLU()

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)) + x)
        return self.act(self.bn2(self.conv2(y)) + self.pool(y))


def test_a_sum_that_broadcasts_is_seen_on_the_example():
    done = fused_as(Mixed(), batch(), bn1=("relu", True, "rewritten"))
    (left,) = done.left
    assert left.name == "bn2"
    assert left.why == (
        "a map of (3, 4, 1, 1) in torch.float64 is added to its result of (3, 4, 6, 5) in "
        "torch.float64"
    )


def test_a_sum_of_two_dtypes_is_seen_on_an_example_under_autocast():
    """The shortcut of the first block is the image, which autocast leaves in float32."""
    model = nn.Sequential(Block(), Block())
    x = batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        done = nk.fuse_activations_(model, x)
        y = model(x)
    assert [f.name for f in done.fused if f.residual] == []
    assert len(done.fused) == 2
    assert {(left.name, "in torch.float32 is added" in left.why) for left in done.left} == {
        ("0.bn2", True), ("1.bn2", True),
    }  # fmt: skip
    assert y.isfinite().all()


def test_outputs_of_16_bits_may_differ_by_roundings():
    model = nn.Sequential(Block(), Block(), Block()).bfloat16()
    done = nk.fuse_activations_(model, batch().bfloat16())
    assert len(done.fused) == 6


def test_norms_of_timm_with_an_activation_go_on_or_say_why_not():
    layers = pytest.importorskip("timm.layers")
    made = {
        "batch": layers.BatchNormAct2d(4, act_layer=nn.SiLU),
        "group": layers.GroupNormAct(4, num_groups=2, act_layer=nn.ReLU),
        "synchronized": layers.convert_sync_batchnorm(layers.BatchNormAct2d(4, act_layer=nn.Tanh)),
        "unknown": layers.BatchNormAct2d(4, act_layer=nn.Softplus, act_kwargs={}),
        "dropped": layers.BatchNormAct2d(4, drop_layer=nn.Dropout2d),
        "none": layers.BatchNormAct2d(4, apply_act=False),
        "watched": layers.BatchNormAct2d(4),
    }
    made["watched"].act.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(made).double()
    before, plain = state_of(model), copy.deepcopy(model)
    keys = list(model.state_dict())
    done = nk.fuse_activations_(model)
    assert {f.name: f.activation for f in done.fused} == {
        "batch": "silu", "group": "relu", "synchronized": "tanh",
    }  # fmt: skip
    assert {left.name: left.why for left in done.left} == {
        "unknown": "its activation is Softplus, which no norm applies",
        "dropped": "Dropout2d comes between it and the activation",
        "none": "no activation follows where it is called",
        "watched": "its activation has forward or backward hooks",
    }
    assert list(model.state_dict()) == keys
    assert not nk.fuse_activations_(model).fused
    for name in ("batch", "group"):
        x = batch().requires_grad_()
        found = [(y, *torch.autograd.grad(y.pow(3).sum(), (x, *m[name].parameters())))
                 for m in (model, plain) for y in (m[name](x),)]  # fmt: skip
        require_alike(*found)
    done.revert()
    assert state_of(model) == before


def test_hooks_are_not_deprived_of_what_they_look_at():
    for watched in ("1", "2"):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nk.BatchNorm(4), nn.ReLU())
        model.get_submodule(watched).register_forward_hook(lambda *_: None)
        done = nk.fuse_activations_(model)
        assert not done.fused
        assert "forward or backward hooks" in done.left[0].why


def test_outputs_that_would_move_are_refused_and_nothing_changes(monkeypatch):
    monkeypatch.setattr(
        "normkit.fusing.known._MODULES", {"torch.nn.modules.activation.ReLU": "tanh"}
    )
    model = Block()
    before = state_of(model)
    with pytest.raises(ConversionError, match="outputs on the example input differ by"):
        nk.fuse_activations_(model, batch().float())
    assert state_of(model) == before


def test_an_optimizer_goes_on_with_the_same_parameters():
    model, plain = Block(), Block()
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain)]
    done = nk.fuse_activations_(model)
    for seed in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            m(batch(seed).float()).square().mean().backward()
            optimizer.step()
    done.revert()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_rewritten_forward_compiles():
    model = Block().double()
    expected = model.eval()(batch())
    nk.fuse_activations_(model)
    assert_close(torch.compile(model, fullgraph=True)(batch()), expected)


def test_folding_keeps_the_activation():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()).eval()
    expected = model(batch().float())
    nk.fuse_activations_(model)
    folded = nk.fold(model, batch().float())
    assert_close(folded.model(batch().float()), expected, atol=1e-5, rtol=1e-5)


def test_conversion_keeps_the_activation():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nk.BatchNorm(4, activation="gelu"))
    nk.convert_norm_(model, "gn:2")
    assert model[1].activation == "gelu"


NOTHING_TO_FUSE = ("timm:starnet_s1", "timm:inception_next_atto")
"""Networks in which no activation follows a norm."""
MORE = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:mnasnet0_5")


def test_forty_networks_fuse():
    assert len({*WITH_BATCH_NORM, *MORE}.difference(NOTHING_TO_FUSE)) >= 40


@pytest.mark.parametrize("name", [*WITH_BATCH_NORM, *MORE])
def test_real_networks_train_as_before_and_come_back(name):
    model, x = build(name).double(), images(name, 2).double()
    before, plain = state_of(model), copy.deepcopy(model)
    keys = list(model.state_dict())
    done = nk.fuse_activations_(model, x)
    assert bool(done.fused) == (name not in NOTHING_TO_FUSE)
    assert list(model.state_dict()) == keys
    assert not nk.fuse_activations_(model).fused
    require_alike(step(plain, x), step(model, x), 1e-5)
    done.revert()
    assert state_of(model) == before
    require_alike(step(plain, x), step(model, x), 1e-5)
