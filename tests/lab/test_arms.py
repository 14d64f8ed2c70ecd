"""Arms: read, written, placed where the papers place them, refused where there is no place."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import normkit as nk
from normkit.inference.freeze import is_frozen
from normkit.lab.arm_names import ARMS
from normkit.lab.arms import Arm, parse_arms
from normkit.lab.changes import WEIGHTS, remove_norms_
from normkit.lab.models import build_model
from normkit.lab.models.build import apply_arm
from normkit.lab.spec import TrainingSpec

NET = "small-resnet:blocks=2"
"""Norms in order: the stem's "1", then norm1 and norm2 of the blocks "3" to "6"."""
NORMS = ["1", *(f"{block}.norm{n}" for block in (3, 4, 5, 6) for n in (1, 2))]
EVERY = [
    "bn", "gn:8", "none", "frozen-bn", "ibn-a", "xbn/gn:64", "xbn-p1/gn:64", "xbn-d2/gn:64",
    "gnbn/gn:4", "gn:8+ws", "none+ws", "xbn/gn:8+cwn", "bn+wn", "bn+ws:center", "bn+ws:scale",
]  # fmt: skip


def build(arm, name=NET, **options):
    return build_model(name, num_classes=10, input_shape=(3, 16, 16), norm=arm, **options)


# --- read and written ---


@pytest.mark.parametrize(
    "text", [*EVERY, "ibn-b", "four-things+ws", "xbn-p1-d2/in", "ibn-a:ratio=0.25+ws"]
)
def test_an_arm_prints_as_it_was_written(text):
    assert str(Arm.parse(text)) == text
    assert Arm.parse(Arm.parse(text)) == Arm.parse(text)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("xbn-p2/gn:64", "xbn/gn:64"),
        ("xbn-d1/gn:64", "xbn/gn:64"),
        ("xbn-d2-p1/gn:64", "xbn-p1-d2/gn:64"),
        ("xbn/gn:num_groups=8", "xbn/gn:8"),
        ("ibn", "ibn-a"),
        ("ibn:ratio=0.25+ws", "ibn-a:ratio=0.25+ws"),
        ("bcn:8:micro", "bcn:8:micro_batch"),
        (nk.NormSpec.parse("gn:8+ws"), "gn:8+ws"),
        (" none ", "none"),
    ],
)
def test_an_arm_is_written_one_way(given, canonical):
    assert str(Arm.parse(given)) == canonical


@given(
    placement=st.sampled_from(["", "gnbn/", "xbn/", "xbn-p1/", "xbn-p3-d12/", "xbn-d4/"]),
    norm=st.sampled_from(["gn:8", "in", "gn:max=32:channels=4", "gn:affine=false", "gw:4"]),
    weights=st.sampled_from(["", *(f"+{name}" for name in WEIGHTS)]),
)
def test_any_arm_round_trips(placement, norm, weights):
    arm = Arm.parse(placement + norm + weights)
    assert str(arm) == placement + norm + weights
    assert Arm.parse(str(arm)) == arm
    assert hash(Arm.parse(str(arm))) == hash(arm)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group", r"names norm 'group'; the norms are: .* \(besides norms there are: none, frozen"),
        (
            "frozen",
            r"names norm 'frozen'; .*besides norms there are: none, frozen-bn, four-things, ibn-",
        ),
        ("gn:8+wz", r"ends in \+wz; the endings are: \+ws, \+ws:center, \+ws:scale, \+wn, \+cwn"),
        ("gn:8+ws+wn", r"ends in \+ws\+wn; the endings are"),
        ("gn:8+", r"ends in \+; the endings are"),
        ("xbn", r"says no norm to place; write it after a /: xbn/gn:4"),
        ("xbn-d2+ws", r"says no norm to place; write it after a /: xbn-d2/gn:4"),
        ("gnbn", r"says no norm to place; write it after a /: gnbn/gn:4"),
        ("xbn/bn", r"'xbn/bn' cannot place its norm: .* batch-free: in, ln, gn, pn, gw"),
        ("gnbn/bcn:8:micro", r"cannot place its norm: .*takes statistics over the batch"),
        ("xbn/zz", r"cannot place its norm: .*names norm 'zz'; the norms are"),
        ("xbn/", r"cannot place its norm: .*the norms are"),
        ("xbn-p0/gn", r"has 'xbn-p0' before the /; it is xbn, xbn-p1 \(position\), xbn-d2 \(every"),
        ("xbn-p/gn", r"has 'xbn-p' before the /"),
        ("xbn-/gn", r"has 'xbn-' before the /"),
        ("xbn-p1-p2/gn", r"has 'xbn-p1-p2' before the /"),
        ("xbn-q1/gn", r"has 'xbn-q1' before the /"),
        ("xbn-p\N{SUPERSCRIPT TWO}/gn", r"before the /"),
        ("ibn-a/gn:4", r"has 'ibn-a' before the /; it is .* or gnbn"),
        ("none:affine", r"'none:affine' gives none options, but it has none; write none"),
        ("frozen-bn:eps=1", r"gives frozen-bn options, but it has none; write frozen-bn"),
        ("ibn-b:ratio=0.5", r"gives ibn-b options, but it has none; write ibn-b"),
        ("ibn-a:colour=1", r"sets 'colour'; its options are: .*ratio"),
        ("x" * 500, r"an arm of 500 characters was given"),
        ("", r"the norms are"),
        (3, r"an arm is a text such as 'gn:8'; 3 was given"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(nk.SpecError, match=message):
        Arm.parse(text)


def test_lists_of_arms():
    assert [str(arm) for arm in parse_arms("bn, none ,xbn/gn:64")] == ["bn", "none", "xbn/gn:64"]
    with pytest.raises(nk.SpecError, match="names ibn-a twice; name each norm once"):
        parse_arms("ibn,ibn-a")


def test_the_page_of_compare_has_every_arm_with_its_line():
    page = Path(__file__).parents[2].joinpath("docs/compare.md").read_text(encoding="utf-8")
    for arm, meaning in ARMS.items():
        assert f"| `{arm}` | {meaning} |\n" in page
    assert {f"+{name}" for name in WEIGHTS} == {arm for arm in ARMS if arm.startswith("+")}


def test_micro_batches_follow_the_learning_rate_in_any_arm():
    def follows(norm):
        return TrainingSpec(norm=norm, batch_size=2).has_learning_rate_as_update_rate

    assert follows("bcn:8:micro")
    assert follows("bcn:8:micro+cwn")
    assert not follows("bcn:8:micro:rate=0.1+ws")
    assert not any(map(follows, ("bcn:8", "none", "ibn-b", "xbn/gn:4")))


# --- what stands where ---

BN = "BatchNorm"
WHERE = {
    # norm 2 of each block; a group of one channel where there are fewer than 64 (Huang et al.)
    "xbn/gn:64": {f"{b}.norm2": f"gn:{c}" for b, c in ((3, 32), (4, 32), (5, 64), (6, 64))},
    "xbn-p1/gn:64": {f"{b}.norm1": f"gn:{c}" for b, c in ((3, 32), (4, 32), (5, 64), (6, 64))},
    "xbn-d2/gn:64": {"4.norm2": "gn:32", "6.norm2": "gn:64"},
    "xbn-p1-d4/in": {"6.norm1": "in"},
    "xbn/gn:max=32:channels=4": {"3.norm2": "gn:8", "4.norm2": "gn:8", "5.norm2": "gn:16"}
    | {"6.norm2": "gn:16"},
    # odd positions of nine
    "gnbn/gn:4": dict.fromkeys(["1", "3.norm2", "4.norm2", "5.norm2", "6.norm2"], "gn:4"),
    # all stages but the last
    "ibn-a": dict.fromkeys(["3.norm1", "4.norm1"], "ibn"),
    "ibn-a:ratio=0.25": dict.fromkeys(["3.norm1", "4.norm1"], "ibn:ratio=0.25"),
    "frozen-bn": {},
    "gn:channels=4": dict.fromkeys(NORMS[:1], "gn:4")
    | dict.fromkeys(NORMS[1:5], "gn:8")
    | dict.fromkeys(NORMS[5:], "gn:16"),
}
KINDS = {"gn": nk.GroupNorm, "in": nk.InstanceNorm, "ibn": nk.InstanceBatchNorm, "bn": nk.BatchNorm}


@pytest.mark.parametrize("arm", WHERE)
def test_an_arm_puts_its_norm_where_its_paper_does_and_bn_elsewhere(arm):
    built = build(arm)
    expected = dict.fromkeys(NORMS, "bn") | WHERE[arm]
    for name, spec in expected.items():
        layer = built.model.get_submodule(name)
        assert isinstance(layer, KINDS[spec.partition(":")[0]]), name
        if spec.startswith("gn:"):
            assert layer.num_groups == int(spec.removeprefix("gn:"))
            assert layer.num_features % layer.num_groups == 0
    assert [place.name for place in built.norms] == NORMS
    if arm != "frozen-bn":
        assert {place.name: place.norm for place in built.norms} == expected
    assert built.standardized == ()
    assert built.model.training


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 128])
def test_four_things_are_those_of_the_tool(batch_size):
    built = build("four-things", batch_size=batch_size)
    other = build(None).model
    nk.four_things(other, batch_size)
    assert [str(m) for m in built.model.modules()] == [str(m) for m in other.modules()]


def test_four_things_need_a_batch_size():
    with pytest.raises(nk.SpecError, match="four-things is chosen by the batch size; give batch"):
        build("four-things")


def test_none_leaves_no_norm():
    built = build("none")
    assert all(type(built.model.get_submodule(name)) is nn.Identity for name in NORMS)
    assert [(place.name, place.norm) for place in built.norms] == [(n, "none") for n in NORMS]
    kinds = {
        type(m)
        for m in built.model.modules()
        if next(m.parameters(recurse=False), None) is not None
    }
    assert kinds == {nn.Conv2d, nn.Linear}
    assert all(m.bias is None for m in built.model.modules() if isinstance(m, nn.Conv2d))


def test_none_keeps_the_activation_inside_of_a_norm():
    model = build_model("timm:regnety_002", num_classes=10, input_shape=(3, 32, 32)).model
    bare = build_model("timm:regnety_002", num_classes=10, input_shape=(3, 32, 32), norm="none")
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):  # timm's, with a ReLU or nothing inside
            rest, x = bare.model.get_submodule(name), torch.randn(2, norm.num_features, 3, 3)
            has_act = not isinstance(norm.act, nn.Identity)
            torch.testing.assert_close(rest(x), x.relu() if has_act else x)
    assert any(norm.norm == "none" for norm in bare.norms)


def test_none_keeps_the_activation_of_our_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nk.BatchNorm(4, activation="leaky_relu", negative_slope=0.5)
    )
    x = torch.randn(2, 3, 6, 6)
    expected = nn.functional.leaky_relu(model[0](x), 0.5)
    remove_norms_((model, (x,)), "ours")
    torch.testing.assert_close(model(x), expected)


def test_ibn_b_has_instance_norm_in_the_stem_and_after_the_sums_of_two_stages():
    built = build("ibn-b", "torchvision:resnet18")
    instance = {n for n, m in built.model.named_modules() if isinstance(m, nk.InstanceNorm)}
    assert instance == {"bn1", "layer1.1.sum_norm", "layer2.1.sum_norm"}
    assert {place.name for place in built.norms if place.norm == "in"} == instance
    assert {place.norm for place in built.norms if place.name not in instance} == {"bn"}
    assert len(built.norms) == 22
    assert not any(type(m) is nn.BatchNorm2d for m in built.model.modules())


def test_frozen_bn_keeps_its_statistics_and_learns_its_scale():
    model = build("frozen-bn").model
    layers = [model.get_submodule(name) for name in NORMS]
    assert all(map(is_frozen, layers))
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert before
    model.train()(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(layer.weight.grad is not None for layer in layers)
    x = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(layers[0](x), x / (1 + 1e-5) ** 0.5)  # mean 0, variance 1


def test_frozen_bn_goes_by_the_statistics_that_a_network_came_with():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_mean.fill_(3.0)
    model[1].running_var.fill_(4.0)
    expected = model.eval()(x := torch.randn(2, 3, 5, 5))
    apply_arm(model, "frozen-bn", batch_size=2, input_shape=(3, 5, 5), name="mine")
    torch.testing.assert_close(model.train()(x), expected)


@pytest.mark.parametrize("arm", EVERY)
def test_every_arm_trains_a_step(arm):
    model = build(arm).model
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# --- weights ---


def of_filters(weight):
    """Mean, biased variance and length of each filter, in float64."""
    rows = weight.detach().double().flatten(1)
    shape = (-1, *[1] * (weight.ndim - 1))
    mean = rows.mean(1)
    var = (rows - mean[:, None]).square().mean(1)
    return rows.view(weight.shape), mean.view(shape), var.view(shape), rows.norm(dim=1).view(shape)


def expected_weight(ending, weight, first):
    """What a convolution computes with, from its raw weight now and at first (METHODS: WS, WN)."""
    rows, mean, var, length = of_filters(weight)
    return {
        "ws": (rows - mean) / (var + 1e-5).sqrt(),
        "ws:center": rows - mean,
        "ws:scale": rows / (var + 1e-5).sqrt(),
        "wn": of_filters(first)[3] * rows / length,
        "cwn": 1.414 * (rows - mean) / of_filters(rows - mean)[3],
    }[ending]


@pytest.mark.parametrize("norm", ["gn:8", "none", "xbn/gn:8", "ibn-a", "frozen-bn"])
@pytest.mark.parametrize("ending", WEIGHTS)
def test_convolutions_compute_with_the_weights_that_the_ending_says(ending, norm):
    built = build(f"{norm}+{ending}")
    plain = dict(build(norm).model.named_parameters())
    convolutions = {n: m for n, m in built.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(built.standardized) == set(convolutions)
    assert all(place.norm.endswith(f"+{ending}") for place in built.norms)
    for name, layer in convolutions.items():
        raw, first = layer.parametrizations.weight.original, plain[f"{name}.weight"]
        assert torch.equal(raw, first), name
        for _ in range(2):  # at first, and where training has moved the raw weight
            wanted = expected_weight(ending, raw, first)
            torch.testing.assert_close(layer.weight.double(), wanted, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                raw.add_(torch.randn(raw.shape) + 0.5)


def initial_values(model):
    """Raw weights and biases of convolutions and linear layers, by name."""
    named = {
        n: p for n, p in model.named_parameters() if "norm" not in n and not n.startswith("1.")
    }
    raw = {n.replace(".parametrizations.weight.original", ".weight"): p for n, p in named.items()}
    return {n: p for n, p in raw.items() if ".parametrizations." not in n}  # no gains


@pytest.mark.parametrize("arm", EVERY)
def test_equal_seeds_give_equal_weights_in_every_arm(arm):
    expected = initial_values(build(None, seed=3).model)
    found = initial_values(build(arm, seed=3).model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
