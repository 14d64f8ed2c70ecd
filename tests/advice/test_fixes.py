"""Every fix that is a call runs and helps, on new models and on trained ones."""

import ast
import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

import normkit as nk
from advice.defects import BN, DEFECTS, conv, dense, trained
from normkit.advice.registry import CHECKS

COST = "further training: it changes what the trained network computes"


def calls_in(text):
    """The calls in a fix, each as far as it can be parsed."""
    at = 0
    while match := re.compile(r"\b(?:nk|model)\.").search(text, at):
        ends = [i + 1 for i in range(match.end(), len(text)) if text[i] == ")"]
        whole = [end for end in ends if parses(text[match.start() : end])]
        if not whole:
            raise AssertionError(f"no call can be read in {text[match.start() :]!r}")
        at = max(end for end in whole if end - match.start() <= len(text))
        at = min(whole) if ", or " in text[min(whole) : at] else at
        yield text[match.start() : at]


def parses(text):
    try:
        return isinstance(ast.parse(text, mode="eval").body, ast.Call)
    except SyntaxError:
        return False


def alternatives(fix):
    return [part for part in re.split(r"[,;] or ", fix) if re.search(r"\b(nk|model)\.", part)]


ROWS = [(row[0], *row[2:6]) for row in DEFECTS if row[0] != "model not followed"]
IDS = [f"{row[0]}, {i}" for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("pretrained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize(("name", "at", "batch", "shape", "broken"), ROWS, ids=IDS)
def test_every_call_in_a_fix_runs_and_helps(name, at, batch, shape, broken, pretrained):
    options = {"batch_size": batch, "input_shape": shape, "pretrained": pretrained}
    found = nk.validate(copy.deepcopy(broken), **options)
    [finding] = [each for each in found if (each.check, each.name) == (name, at)]
    source = torch.Generator().manual_seed(0)
    batches = [torch.rand((max(batch, 2), *shape), generator=source) for _ in range(2)]
    for alternative in alternatives(finding.fix):
        model = copy.deepcopy(broken)
        calls = list(calls_in(alternative))
        for call in calls:
            eval(call, {"nk": nk, "model": model, "batches": batches})
        if any("recommend" not in call for call in calls):
            left = nk.validate(model, **options)
            assert (name, at) not in [(each.check, each.name) for each in left], alternative
        changes = "recalibrate" in alternative or "reset" in alternative or name == "eps near 0"
        before = evaluated(copy.deepcopy(broken), batches[0])
        if pretrained and COST not in alternative and not changes and before is not None:
            torch.testing.assert_close(evaluated(model, batches[0]), before)


def evaluated(model, x):
    """The output at evaluation; None where the model refuses the input."""
    try:
        return model.eval()(x)
    except (ValueError, RuntimeError):
        return None


def fix_of(check, model, **options):
    """The fix that a check has for a model."""
    options = {"batch_size": 2, "input_shape": (3, 8, 8)} | options
    [finding] = [each for each in nk.validate(model, **options) if each.check == check]
    return finding.fix


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_advice_for_few_examples_is_that_of_recommend(size):
    fresh = fix_of("few examples", conv(BN(8)), batch_size=size)
    assert any(each.apply in fresh for each in nk.recommend(size))
    learned = fix_of("few examples", conv(trained(BN(8))), batch_size=size)
    best = nk.recommend(size, pretrained=True)[0]
    assert learned.startswith(f"{best.apply}, with which it predicts as before")
    assert best.keeps_function


@pytest.mark.parametrize(
    ("edit", "is_trained"),
    [
        (lambda norm: None, False),
        (lambda norm: norm.weight.fill_(0), False),  # as where a residual branch ends
        (lambda norm: norm.running_mean.fill_(0.1), True),
        (lambda norm: norm.running_var.fill_(2), True),
        (lambda norm: norm.num_batches_tracked.fill_(1), True),
        (lambda norm: norm.weight[0].fill_(2), True),
        (lambda norm: norm.bias[0].fill_(2), True),
    ],
)
def test_values_that_have_moved_are_learned_ones(edit, is_trained):
    model = conv(BN(8))
    with torch.no_grad():
        edit(model[1])
    assert ("freeze_statistics" in fix_of("few examples", model)) == is_trained
    assert "freeze_statistics" in fix_of("few examples", model, pretrained=True)
    assert "freeze_statistics" not in fix_of("few examples", model, pretrained=False)


def test_a_trained_norm_of_examples_may_only_change_at_a_price():
    model = conv(nn.GroupNorm(8, 8))
    with torch.no_grad():
        model[1].weight[0] = 2
    fix = fix_of("single values", model, input_shape=(3, 1, 1))
    assert fix == f'nk.convert_norm_(model, {{"1": "ln"}}, calibrate=batches) and {COST}'


def test_learned_values_are_not_reset():
    model = conv(trained(BN(8)))
    model[1].running_var[0] = float("nan")
    weight = model[1].weight.detach().fill_(3.0).clone()
    fix = fix_of("broken values", model)
    assert fix.startswith("nk.recalibrate(model, batches).apply() measures them anew")
    batches = [torch.rand(8, 3, 8, 8)]
    eval(next(iter(calls_in(fix))), {"nk": nk, "model": model, "batches": batches})
    assert torch.equal(model[1].weight, weight)
    assert model.eval()(batches[0]).isfinite().all()
    model[1].bias.data[0] = float("inf")
    assert "load a checkpoint from before" in fix_of("broken values", model)


class GraphInstanceNorm(_InstanceNorm):
    """Normalises over what are examples to others, as torch_geometric's does."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + self.eps).sqrt()


def test_a_class_with_a_forward_of_its_own_is_not_taken_for_its_base():
    model = nn.Sequential(nn.Linear(4, 8), GraphInstanceNorm(8, track_running_stats=True))
    found = nk.validate(model, batch_size=12, input_shape=(4,))
    [finding] = [each for each in found if each.name == "1"]
    assert finding.check == "not looked at"
    assert "GraphInstanceNorm: it is unknown which values share its statistics" in finding.what


class Plain(nn.BatchNorm2d):
    """A subclass with torch's forward, which conversion has no rule for."""


@pytest.mark.parametrize("everywhere", [True, False])
def test_what_conversion_refuses_is_not_proposed(everywhere):
    model = nn.Sequential(conv(Plain(8)), nn.Conv2d(8, 64, 1), BN(64))
    if everywhere:
        model[2] = Plain(64)
    found = nk.validate(model, batch_size=2, input_shape=(3, 8, 8))
    fixes = {each.name: each.fix for each in found if each.check == "few examples"}
    assert "put there by hand: conversion refuses Plain (" in fixes["0.1"]
    assert fixes["2"].startswith(
        "another norm in its place" if everywhere else 'nk.convert_norm_(model, {"2": "gn:max=32"})'
    )


def test_a_larger_batch_is_proposed_where_it_helps():
    ghost = dense(nk.GhostBatchNorm(8, ghost_batch_size=4))
    fix = fix_of("single values", ghost, batch_size=9, input_shape=(3,))
    assert fix.startswith("a batch size whose remainder by 4 is larger or 0, or nk.convert_norm_")
    instance = conv(nn.InstanceNorm2d(8))
    assert "larger batch" not in fix_of("single values", instance, input_shape=(3, 1, 1))
    fix = fix_of("single values", dense(nn.BatchNorm1d(8)), batch_size=1, input_shape=(3,))
    assert fix.startswith("a larger batch, or ")


def test_few_channels_do_not_become_few_values_of_another_norm():
    fix = fix_of("few values", conv(nn.GroupNorm(2, 4), channels=4), input_shape=(3, 1, 1))
    assert fix == "a larger map: an example has 4 values"


def test_statistics_that_were_switched_off_are_described_as_they_are():
    model = conv(trained(BN(8)))
    model[1].track_running_stats = False
    found = nk.validate(model, batch_size=32, input_shape=(3, 8, 8))
    assert [each.check for each in found] == ["frozen for now"]
    assert found[0].what.startswith("track_running_stats was switched off: the running statistics")
    fix = fix_of("frozen for now", model, batch_size=32)
    eval(next(iter(calls_in(alternatives(fix)[0]))), {"nk": nk, "model": model})
    assert nk.validate(model, batch_size=32, input_shape=(3, 8, 8)) == []


def test_a_stage_is_frozen_by_its_own_name():
    model = conv(nk.BatchChannelNorm(8, num_groups=2))
    model.train()[1].eval()
    fix = fix_of("frozen for now", model, batch_size=32)
    assert 'name == "1.batch"' in fix


def test_every_check_is_tried():
    assert {row[0] for row in ROWS} | {"model not followed", "no statistics yet"} == CHECKS.keys()


@pytest.mark.parametrize(
    ("batch", "why"), [(1, "refuses such batches"), (4, "the result is the bi")]
)
def test_a_refusal_of_one_example_is_not_one_of_the_batch(batch, why):
    """Torch's group norm trains on groups of one value, unless there is one example."""
    model = nn.Sequential(nn.GroupNorm(8, 8))
    [finding] = nk.validate(model, batch_size=batch, input_shape=(8, 1, 1))
    assert why in finding.why
    if batch > 1:
        assert model(torch.randn(batch, 8, 1, 1)).abs().max() < 1e-4
