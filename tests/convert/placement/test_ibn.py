"""IBN-Net: which norms change, where one is added, and what it computes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation
from torch import nn
from torch.testing import assert_close

import normkit as nk
from convert.placement.nets import (
    Block,
    DistributedDataParallel,
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

SMALL = {"layer1": 2, "layer2": 2, "layer3": 2}
LARGE = {"layer1": 3, "layer2": 4, "layer3": 6}
FIRST_NORMS = {
    "torchvision:resnet18": each(SMALL, "bn1"),
    "torchvision:resnet50": each(LARGE, "bn1"),
    "torchvision:resnext50_32x4d": each(LARGE, "bn1"),
    "torchvision:wide_resnet50_2": each(LARGE, "bn1"),
    "torchvision:mobilenet_v2": [f"features.{i}.conv.0.1" for i in range(2, 14)],
    "timm:resnet18": each(SMALL, "bn1"),
    "timm:resnet50d": each(LARGE, "bn1"),
    "timm:resnext50_32x4d": each(LARGE, "bn1"),
    "timm:mobilenetv2_100": each(
        {"blocks.1": 2, "blocks.2": 3, "blocks.3": 4, "blocks.4": 3}, "bn1"
    ),
}
AFTER_SUMS = {
    "torchvision:resnet18": ["bn1", "layer1.1.sum_norm", "layer2.1.sum_norm"],
    "torchvision:resnet50": ["bn1", "layer1.2.sum_norm", "layer2.3.sum_norm"],
    "torchvision:resnext50_32x4d": ["bn1", "layer1.2.sum_norm", "layer2.3.sum_norm"],
    "torchvision:mobilenet_v2": ["features.0.1", "features.3.sum_norm", "features.6.sum_norm"],
    "timm:resnet18": ["bn1", "layer1.1.act2", "layer2.1.act2"],
    "timm:resnet50d": ["bn1", "layer1.2.act3", "layer2.3.act3"],
    "timm:mobilenetv2_100": ["bn1", "blocks.1.1.sum_norm", "blocks.2.2.sum_norm"],
}
KINDS = ["basic", "bottleneck", "inverted", "timm"]


@pytest.mark.parametrize("name", FIRST_NORMS)
def test_a_takes_the_first_norm_of_the_blocks_of_all_stages_but_the_last(name):
    done = nk.place_ibn_(build(name))
    assert changed(done) == FIRST_NORMS[name]
    found = [n for n, m in done.model.named_modules() if isinstance(m, nk.InstanceBatchNorm)]
    assert found == FIRST_NORMS[name]


@pytest.mark.parametrize("name", AFTER_SUMS)
def test_b_takes_the_stem_and_the_ends_of_the_first_two_stages(name):
    model = build(name)
    keys = list(model.state_dict())
    done = nk.place_ibn_(model, "b")
    assert changed(done) == AFTER_SUMS[name]
    found = [n for n, m in model.named_modules() if isinstance(m, nk.InstanceNorm)]
    assert found == AFTER_SUMS[name]
    added = [f"{n}.{key}" for n in AFTER_SUMS[name][1:] for key in ("weight", "bias")]
    lost = [f"{AFTER_SUMS[name][0]}.{key}" for key in ("running_mean", "running_var")]
    lost.append(f"{AFTER_SUMS[name][0]}.num_batches_tracked")
    assert {*model.state_dict()} == {*keys, *added} - {*lost}


@pytest.mark.parametrize(
    ("kind", "variant"), [*((kind, "b") for kind in KINDS), ("basic", "a"), ("inverted", "a")]
)
def test_it_trains_copies_pickles_and_all_comes_back(kind, variant):
    model, x = small(kind), images(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    train_step(model, x, optimizer)
    before, held = state_of(model), list(optimizer.param_groups[0]["params"])
    done = nk.place_ibn_(model, variant, optimizer=optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    y = model.eval()(x)
    assert_close(copy.deepcopy(model)(x), y)
    assert_close(pickle.loads(pickle.dumps(done)).model(x), y)
    model.train()
    assert done.revert() is model
    assert_as_before(model, before)
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))
    nk.place_ibn_(model, variant, optimizer=optimizer)
    assert train_step(model, x, optimizer).isfinite().all()


def normed(x, norm):
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)


def block_by_definition(block, x, *, middle=None, after=lambda y: y):
    """A bottleneck from torch's functions, with another first norm or one after the sum."""
    first = middle or (lambda y: normed(y, block.bn1))
    y = first(F.conv2d(x, block.conv1.weight)).relu()
    y = normed(F.conv2d(y, block.conv2.weight, stride=block.stride, padding=1), block.bn2).relu()
    y = normed(F.conv2d(y, block.conv3.weight), block.bn3)
    if block.downsample is not None:
        conv = next(m for m in block.downsample.modules() if isinstance(m, nn.Conv2d))
        norm = next(m for m in block.downsample.modules() if isinstance(m, nn.BatchNorm2d))
        x = normed(F.conv2d(x, conv.weight, stride=conv.stride), norm)
    return after(y + x).relu()


def drawn(model):
    """Give every scale and shift values of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(len(parameter), generator=generator) + 0.5)
    return model.double().train()


@pytest.mark.parametrize(("kind", "index"), [("bottleneck", 0), ("bottleneck", 1), ("timm", 1)])
def test_b_computes_the_block_with_an_instance_norm_after_the_sum(kind, index):
    model = drawn(small(kind))
    nk.place_ibn_(model, "b")
    last, end = model.layer1[1], "sum_norm" if kind == "bottleneck" else "act3"
    norm = drawn(last.get_submodule(end))
    block = last if index else model.layer1[0]

    def after(y):
        return F.instance_norm(y, weight=norm.weight, bias=norm.bias) if index else y

    x = torch.randn(3, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    y, expected = block(x), block_by_definition(block, x, after=after)
    assert_close(y, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(out.pow(3).sum(), [x, norm.weight], allow_unused=True)
                 for out in (y, expected)]  # fmt: skip
    assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_b_computes_a_basic_block_with_an_instance_norm_after_the_sum():
    model = drawn(small("basic"))
    nk.place_ibn_(model, "b")
    block = model.layer1[1]
    x = torch.randn(3, 16, 5, 7, dtype=torch.float64)
    y = normed(F.conv2d(x, block.conv1.weight, padding=1), block.bn1).relu()
    y = normed(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
    assert_close(block(x), F.instance_norm(y + x).relu(), rtol=1e-9, atol=1e-9)


def test_a_computes_the_block_with_half_of_the_channels_by_example():
    model = drawn(small("bottleneck"))
    old = model.layer1[1].bn1
    weight, bias = old.weight.detach().clone(), old.bias.detach().clone()
    nk.place_ibn_(model, "a")
    block = model.layer1[1]

    def middle(y):
        front = F.instance_norm(y[:, :2], weight=weight[:2], bias=bias[:2])
        rest = F.batch_norm(y[:, 2:], None, None, weight[2:], bias[2:], training=True)
        return torch.cat((front, rest), dim=1)

    x = torch.randn(3, 16, 5, 7, dtype=torch.float64)
    expected = block_by_definition(block, x, middle=middle)
    assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_an_added_norm_joins_the_group_of_the_blocks_norms():
    model = small("bottleneck")
    groups = nk.param_groups(model, 1e-4, norm_weight_decay=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    nk.place_ibn_(model, "b", optimizer=optimizer)
    weight = next(g for g in optimizer.param_groups if holds(g, model.layer1[1].bn3.weight))
    assert holds(weight, model.layer1[1].sum_norm.weight)
    bias = next(g for g in optimizer.param_groups if holds(g, model.layer1[1].bn3.bias))
    assert holds(bias, model.layer1[1].sum_norm.bias)


def holds(group, parameter):
    return any(parameter is p for p in group["params"])


def test_an_added_norm_whose_neighbours_are_not_trained_joins_the_first_group():
    model = small("bottleneck")
    optimizer = torch.optim.SGD(model.layer4.parameters(), lr=0.1)
    done = nk.place_ibn_(model, "b", optimizer=optimizer)
    assert holds(optimizer.param_groups[0], model.layer1[1].sum_norm.weight)
    assert "layer1.1.sum_norm.bias joined the optimizer's first group" in str(done)


def test_hooks_and_modes_of_a_block_stay():
    model = small("bottleneck").eval()
    calls = []
    handle = model.layer1[1].register_forward_hook(lambda *_: calls.append(1))
    nk.place_ibn_(model, "b")
    assert not any(module.training for module in model.modules())
    model(images(32))
    handle.remove()
    model(images(32))
    assert calls == [1]


def test_xbn_and_ibn_together():
    model = small("bottleneck")
    first = nk.place_ibn_(model, "b")
    second = nk.place_xbn_(model, norm="gn:4")
    assert changed(second) == each({"layer1": 2, "layer2": 1, "layer3": 1, "layer4": 1}, "bn2")
    second.revert()
    first.revert()
    assert type(model.layer1[1].bn2) is nn.BatchNorm2d


def test_twice_is_once_and_the_report_says_what_the_added_norms_are():
    model = small("bottleneck")
    nk.place_ibn_(model, "b")
    again = nk.place_ibn_(model, "b")
    why = {left.name: left.why for left in again.left}
    assert again.changes == ()
    assert why["layer1.1.sum_norm"] == "it comes after the sum of block 2"
    assert why["bn1"] == "it is in already"
    model = small("basic")
    nk.place_ibn_(model, "a")
    assert nk.place_ibn_(model, "a").changes == ()


def test_the_report():
    done = nk.place_ibn_(small("timm"), "b", dry_run=True)
    rows = [(c.name, c.old, c.new, c.carried) for c in done.changes]
    assert rows == [
        ("bn1", "BatchNorm2d(8)", "in", ("weight", "bias")),
        ("layer1.1.act3", "ReLU", "in", ("activation ReLU",)),
        ("layer2.0.act3", "ReLU", "in", ("activation ReLU",)),
    ]
    done = nk.place_ibn_(small("basic"), "b", dry_run=True)
    assert [(c.name, c.old) for c in done.changes[1:]] == [
        ("layer1.1.sum_norm", "nothing"),
        ("layer2.0.sum_norm", "nothing"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interruption_leaves_the_model_as_it_was(kind, monkeypatch):
    model = small(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(swap.OptimizerEdit, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        nk.place_ibn_(model, "b", optimizer=optimizer)
    assert_as_before(model, before)


class SharedActivation(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 1), act
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        """Compute the output."""
        return self.act(x + self.norm2(self.conv(self.norm1(x).relu())))


def stages(*blocks):
    return nn.Sequential(*(nn.Sequential(block) for block in blocks))


ACT = nn.ReLU()


@pytest.mark.parametrize(
    ("model", "variant", "error", "message"),
    [
        (stages(Block(), Block()), "c", nk.OptionError, r"variant='c' .* one of \['a', 'b'\]"),
        (
            nn.Sequential(Block(), Block()),
            "a",
            nk.OptionError,
            "needs at least 2 stages, .* blocks form 1;",
        ),
        (
            nn.Sequential(Block(), Block(stride=2)),
            "b",
            nk.OptionError,
            r"needs at least 3 stages, .* the 2 blocks form 2; .*convert_norm_\(model, \{",
        ),
        (
            stages(Block(), Block(), Block(), Block()),
            "b",
            nk.ConversionError,
            r"0\.0 \(Block\) has no place .* of its own; nothing was changed; .*act = nn\.ReLU\(\)",
        ),
        (
            stages(*(SharedActivation(ACT) for _ in range(4))),
            "b",
            nk.ConversionError,
            "has no place for a norm after its sum: its sum does not go into an activation module",
        ),
        (
            small("inverted", last=1),
            "b",
            nk.ConversionError,
            "has no place for a norm after its sum: it adds no shortcut",
        ),
        (stages(nn.BatchNorm2d(8)), "a", nk.OptionError, "has no residual blocks that could be"),
        (
            DistributedDataParallel(*stages(Block(), Block(), Block(), Block())),
            "a",
            nk.OptionError,
            "is inside DistributedDataParallel",
        ),
    ],
)
def test_what_is_refused(model, variant, error, message):
    before = state_of(model)
    with pytest.raises(error, match=message):
        nk.place_ibn_(model, variant)
    assert_as_before(model, before)
