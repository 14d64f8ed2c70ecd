"""XBN: which norms become batch-free, and what is refused."""

import pytest
import torch
from torch import nn

import normkit as nk
from convert.placement.nets import (
    RESNET18,
    RESNET50,
    Block,
    DistributedDataParallel,
    Hidden,
    Late,
    assert_as_before,
    build,
    changed,
    each,
    images,
    small,
    state_of,
    train_step,
)
from normkit.convert import swap
from normkit.lab.models import build_model

SECOND_NORMS = {
    "torchvision:resnet18": each(RESNET18, "bn2"),
    "torchvision:resnet50": each(RESNET50, "bn2"),
    "torchvision:resnext50_32x4d": each(RESNET50, "bn2"),
    "torchvision:wide_resnet50_2": each(RESNET50, "bn2"),
    "torchvision:mobilenet_v2": [f"features.{i}.conv.1.1" for i in range(2, 18)],
    "timm:resnet18": each(RESNET18, "bn2"),
    "timm:resnet34": each({"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}, "bn2"),
    "timm:resnet50": each(RESNET50, "bn2"),
    "timm:resnet50d": each(RESNET50, "bn2"),
    "timm:resnext50_32x4d": each(RESNET50, "bn2"),
    "timm:resnetv2_50": [
        f"stages.{s}.blocks.{i}.norm2" for s, n in enumerate((3, 4, 6, 3)) for i in range(n)
    ],
    "timm:mobilenetv2_100": each(
        {"blocks.1": 2, "blocks.2": 3, "blocks.3": 4, "blocks.4": 3, "blocks.5": 3, "blocks.6": 1},
        "bn2",
    ),
}
STEMS = {
    "torchvision:resnet50": ["bn1"],
    "torchvision:mobilenet_v2": ["features.0.1"],
    "timm:resnet50d": ["conv1.1", "conv1.4", "bn1"],
    "timm:mobilenetv2_100": ["bn1"],
}


@pytest.mark.parametrize("name", SECOND_NORMS)
def test_the_second_norm_of_each_block(name):
    done = nk.place_xbn_(build(name), norm="gn:max=64")
    assert changed(done) == SECOND_NORMS[name]
    assert all(isinstance(done.model.get_submodule(n), nk.GroupNorm) for n in SECOND_NORMS[name])
    assert sum(isinstance(m, nk.GroupNorm) for m in done.model.modules()) == len(done.changes)


@pytest.mark.parametrize("name", STEMS)
def test_the_stem_on_request(name):
    done = nk.place_xbn_(build(name), norm="in", stem=True)
    assert changed(done) == STEMS[name] + SECOND_NORMS[name]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"position": 1}, each(RESNET50, "bn1")),
        ({"position": 3}, each(RESNET50, "bn3")),
        (
            {"every": 2},  # D2
            [
                "layer1.1.bn2",
                "layer2.0.bn2",
                "layer2.2.bn2",
                "layer3.0.bn2",
                "layer3.2.bn2",
                "layer3.4.bn2",
                "layer4.0.bn2",
                "layer4.2.bn2",
            ],
        ),
        ({"every": 4}, ["layer2.0.bn2", "layer3.0.bn2", "layer3.4.bn2", "layer4.2.bn2"]),  # D4
        ({"every": 8}, ["layer3.0.bn2", "layer4.2.bn2"]),  # D8
        ({"every": 16, "position": 1}, ["layer4.2.bn1"]),
    ],
    ids=str,
)
def test_positions_and_blocks_of_the_paper(options, names):
    assert changed(nk.place_xbn_(build("torchvision:resnet50"), **options)) == names


def test_groups_are_at_most_the_channels_and_the_report_says_what_that_is():
    done = nk.place_xbn_(build("torchvision:resnet50"), stem=True)
    new = {change.name: change.new for change in done.changes}
    assert set(new.values()) == {"gn:64"}
    told = {change.name for change in done.changes if "this is instance norm" in str(change)}
    assert told == {"bn1", "layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2"}
    assert "layer1.2.bn2: 64 groups of one channel each: this is instance norm" in str(done)
    narrow = nn.Sequential(Block(8), Block(8))
    assert [change.new for change in nk.place_xbn_(narrow).changes] == ["gn:8", "gn:8"]


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("in", nk.InstanceNorm), ("gw:4", nk.GroupWhitening), ("gn", nk.GroupNorm)],
)
def test_any_batch_free_norm(norm, kind):
    done = nk.place_xbn_(nn.Sequential(Block(), Block()), norm=norm, every=2)
    assert changed(done) == ["1.norm_b"]
    assert type(done.model[1].norm_b) is kind


def test_weights_before_the_placed_norms_alone_are_standardized():
    done = nk.place_xbn_(nn.Sequential(Block(), Block()), norm="gn:4+ws", position=1, every=2)
    assert done.standardized == ("1.conv1",)


def test_the_small_network_of_the_lab_has_blocks():
    done = nk.place_xbn_(build_model("small-resnet", num_classes=10).model, position=1)
    assert changed(done) == ["3.norm1", "4.norm1"]


def test_the_report_says_what_the_others_are():
    done = nk.place_xbn_(build("torchvision:mobilenet_v2"), norm="in", every=2)
    why = {left.name: left.why for left in done.left}
    assert why["features.0.1"] == "it is in the stem"
    assert why["features.1.conv.0.1"] == "its block has 2 norms, most have 3"
    assert why["features.2.conv.1.1"] == "it is norm 2 of block 1"
    assert why["features.18.1"] == "it is in no residual block"
    resnet = nk.place_xbn_(build("torchvision:resnet18"))
    why = {left.name: left.why for left in resnet.left}
    assert why["layer2.0.downsample.1"] == "it is in the shortcut"
    assert len(why) + len(resnet.changes) == 20


@pytest.mark.parametrize("kind", [Late, Hidden])
def test_blocks_are_counted_in_the_order_of_the_forward(kind):
    x = images(12)
    given = None if kind is Late else x
    done = nk.place_xbn_(kind(), norm="gn:4", every=2, example_input=given)
    assert changed(done) == ["second.norm_b"]
    done.revert()
    done = nk.place_xbn_(done.model, norm="gn:4", stem=True, every=2, example_input=given)
    assert changed(done) == ["start.1", "second.norm_b"]


def test_without_an_example_an_unfollowable_model_is_counted_as_it_is_defined():
    assert changed(nk.place_xbn_(Hidden(), norm="gn:4", every=2)) == ["first.norm_b"]


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "timm"])
def test_it_trains_the_optimizer_follows_and_all_comes_back(name):
    model, x = small(name), images(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    train_step(model, x, optimizer)
    before, held = state_of(model), list(optimizer.param_groups[0]["params"])
    done = nk.place_xbn_(model, norm="gn:max=8", stem=True, optimizer=optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()
    assert done.revert() is model
    assert_as_before(model.train(), before)
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))
    again = nk.place_xbn_(model, norm="gn:max=8", optimizer=optimizer)
    assert train_step(model, x, optimizer).isfinite().all()
    again.revert()
    assert all(model.get_submodule(n) is m for n, m in before[0].items())


def test_twice_is_once():
    model = build("torchvision:resnet18")
    nk.place_xbn_(model)
    before = state_of(model)[0]
    assert nk.place_xbn_(model).changes == ()
    assert all(model.get_submodule(name) is module for name, module in before.items())


def test_a_dry_run_only_reports():
    model = nn.Sequential(Block(), Block())
    before = state_of(model)
    done = nk.place_xbn_(model, dry_run=True)
    assert_as_before(model, before)
    assert str(done).startswith("would convert 2 of 6 norms")


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(Block(), Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(swap.OptimizerEdit, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        nk.place_xbn_(model, optimizer=optimizer)
    assert_as_before(model, before)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (
            nn.Sequential(Block(), Block()),
            {"position": 3},
            nk.OptionError,
            r"position=3 was given, .* \(0 and others\) have 2 norms each; choose one of \[1, 2\]",
        ),
        (
            nn.Sequential(Block()),
            {"position": 0},
            nk.OptionError,
            "position=0 .* whole number of at least 1",
        ),
        (
            nn.Sequential(Block()),
            {"every": True},
            nk.OptionError,
            "every=True .* whole number of at least 1",
        ),
        (
            nn.Sequential(Block(), Block()),
            {"every": 3},
            nk.OptionError,
            "every=3 was given, but the model has 2 blocks with 2 norms; choose at most 2",
        ),
        (nn.Sequential(Block()), {"stem": True}, nk.OptionError, "no norm comes before the blocks"),
        (
            nn.Sequential(Block()),
            {"norm": "bgn:1"},
            nk.SpecError,
            r"norm='bgn:1' takes statistics over the batch; .* batch-free: in, ln, gn, pn, gw",
        ),
        (
            nn.Sequential(Block()),
            {"norm": "in:example_weight=0.5"},
            nk.SpecError,
            "evaluates with running statistics of the training batches.* leave example_weight= out",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)),
            {},
            nk.OptionError,
            r"Sequential has no residual blocks .* convert_norm_\(model, \{",
        ),
        (
            nn.Sequential(Block(96), Block(80)),
            {},
            nk.PartitionError,
            r"nothing was changed\n.*0.norm_b to gn:64[\s\S]*norm=\"gn:max=64\" takes the largest",
        ),
        (
            nn.Sequential(DistributedDataParallel(Block())),
            {},
            nk.OptionError,
            "is inside DistributedDataParallel",
        ),
        (
            torch.compile(nn.Sequential(Block())),
            {},
            nk.OptionError,
            "is compiled",
        ),
    ],
)
def test_what_is_refused(model, options, error, message):
    before = state_of(model)
    with pytest.raises(error, match=message):
        nk.place_xbn_(model, **options)
    assert_as_before(model, before)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:shufflenet_v2_x0_5",  # joins by concatenation
        "timm:repghostnet_050",  # norms side by side
        "timm:res2net50_26w_4s",  # sums between parts of the channels
        "timm:skresnet18",  # branches inside
        "timm:test_vit",  # no batch norm
    ],
)
def test_networks_without_a_chain_of_norms_beside_a_shortcut_are_refused(name):
    with pytest.raises(nk.OptionError, match="has no residual blocks that could be recognised"):
        nk.place_xbn_(build(name))


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        """Compute the output."""
        return self.left(x) if x.sum() > 0 else self.right(x)


class AroundOpaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = Opaque()

    def forward(self, x):
        """Compute the output."""
        return x + self.inside(x)


def test_norms_in_a_part_that_cannot_be_followed_are_no_chain():
    with pytest.raises(nk.OptionError, match="has no residual blocks that could be recognised"):
        nk.place_xbn_(nn.Sequential(AroundOpaque()))


def test_a_norm_without_a_rule_is_refused_by_name():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Block(), Block())
    model[1].norm_b = Own(8)
    with pytest.raises(nk.ConversionError, match=r"1\.norm_b to gn:64: .*Own has no rule"):
        nk.place_xbn_(model)
