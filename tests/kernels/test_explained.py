"""``explain`` says what a call then does."""

import copy
import sys
from functools import partial

import pytest
import torch

import normkit as nk
from cases import EVERY, randn
from normkit.core import groups, positional, stages, synchronized
from normkit.functional import checked
from normkit.kernels import cpu, select
from normkit.kernels.cpu import primitives as cpu_primitives

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
X = randn(4, 6, 5, 3)
DECIDING = [groups, positional, stages, synchronized, checked, sys.modules["normkit.explain"]]


@pytest.fixture
def decided(monkeypatch):
    """Decisions that are taken, as they are taken."""
    found, decide = [], select.decide

    def note(x, call=select.ORDINARY, **options):
        found.append(decide(x, call, **options))
        return found[-1]

    for module in DECIDING:
        monkeypatch.setattr(module, "decide", note)
    return found


@pytest.fixture
def started(monkeypatch):
    """Names of the C++ operators that are started."""
    found = []

    def noted(name, start, *arguments):
        found.append(name)
        return start(*arguments)

    for name, start in list(vars(cpu.operators).items()):
        if callable(start):
            monkeypatch.setattr(cpu.operators, name, partial(noted, name, start))
    for name in ("moments", "apply"):
        start = getattr(cpu_primitives, name)
        monkeypatch.setattr(cpu_primitives, name, partial(noted, name, start))
    return found


def widened(values):
    """The same numbers, not contiguous."""
    return torch.stack((values, values), dim=1)[:, 0]


def immovable(layer):
    for module in layer.modules():
        for name in ("running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                module.register_buffer(name, widened(getattr(module, name)))
    return layer


def without_momentum(layer):
    if hasattr(layer, "momentum") and not getattr(layer, "micro_batch", False):
        layer.momentum = None
    return layer


def watched(layer):
    for module in layer.modules():
        if module is not layer:
            module.register_forward_hook(lambda *args: None)
    return layer


CHANGES = [copy.deepcopy, immovable, without_momentum, watched]


@needs_kernels
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_what_is_said_is_what_is_done(case, training, masked, change, decided, started):
    layer = change(case.make(dtype=torch.float64)).train(training)
    mask = torch.ones(4, 5, 3, dtype=torch.bool) if masked else None
    said = nk.explain(layer, X, mask)
    expected = list(decided)
    decided.clear()
    started.clear()
    layer(X, mask)
    assert said.kernels == expected[0].kernels
    assert all(decision.reason[:20] in said.reason for decision in expected)
    if case.kind != "gw":  # which is never asked
        assert all(decision in decided for decision in expected)
        assert all(decision in expected for decision in decided)
    ways = {decision.way for decision in expected}
    assert bool(started) == bool(ways & {"operator", "tables"})
    assert any("forward" in name for name in started) == ("operator" in ways)
    assert ("torch's operators on tables" in said.reason) == ("tables" in ways)


@needs_kernels
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_an_activation_in_the_same_pass_is_said_and_done(case, started):
    layer = case.make(dtype=torch.float64, activation="silu")
    started.clear()
    layer(X)
    at_once = any(name.startswith("ended_") for name in started)
    said = nk.explain(layer, X).reason
    assert said.endswith("; silu in the same pass" if at_once else "; then silu")
    plain = case.make(dtype=torch.float64)
    assert "silu" not in nk.explain(plain, X).reason


@needs_kernels
def test_who_moves_the_buffers_is_said_and_done(monkeypatch):
    moved, follow = [], nk.core.running.RunningStatistics.follow_
    monkeypatch.setattr(
        nk.core.running.RunningStatistics,
        "follow_",
        lambda self, *args: moved.append(1) or follow(self, *args),
    )
    reasons = {
        immovable: "because they are not contiguous, or neither float32 nor float64",
        without_momentum: "because their momentum is None",
    }
    for name in ("bn", "ghost:2", "bcn:3", "sn", "ibn", "gnplus:3"):
        for change in (copy.deepcopy, immovable, without_momentum):
            layer = change(nk.build(name, 6))
            reason = nk.explain(layer, X.float()).reason
            moved.clear()
            layer(X.float())
            assert bool(moved) == ("torch's operators move the running statistics" in reason)
            assert reasons.get(change, "") in reason
            assert "torch's operators move" not in nk.explain(layer.eval(), X.float()).reason


@needs_kernels
def test_own_and_running_statistics_mixed_are_said():
    layer = nk.BatchNorm(6, example_weight=0.5).eval()
    assert "because own and running statistics are mixed" in nk.explain(layer, X).reason


def test_an_empty_input_is_said():
    found = nk.explain(nk.BatchNorm(6), torch.empty(0, 6, 3))
    assert (found.kernels, found.reason) == ("reference", "the input is empty")


@pytest.fixture
def narrow(monkeypatch):
    """Kernels of whose programs each holds four channels."""
    monkeypatch.setattr(cpu.operators, "MOST_CHANNELS_OF_A_POSITION", 4)
    monkeypatch.setattr(cpu.operators, "MOST_CHANNELS_OF_A_GROUP", 4)


@needs_kernels
def test_more_channels_than_a_program_holds_are_said(narrow, started):
    said = nk.explain(nk.PositionalNorm(6), X)
    limit = "there are 6 channels, and a program of the C++ kernels holds 4"
    assert (said.kernels, said.reason) == ("reference", f"{limit} of a position")
    nk.PositionalNorm(6)(X)
    assert not started
    for name in ("bcn:3", "bcn:3:micro", "sn", "gnplus:3"):
        layer = nk.build(name, 6)
        said = nk.explain(layer, X)
        assert said.kernels == "cpu"
        assert said.reason.endswith(f"with torch's operators on tables, because {limit}")
        started.clear()
        layer(X)
        assert set(started) == {"moments", "apply"}
    started.clear()
    layer = nk.InstanceBatchNorm(6)
    assert "on tables" not in nk.explain(layer, X).reason
    layer(X)
    assert started == ["composite_forward"]


@needs_kernels
def test_a_weight_for_every_example_is_decided_in_the_same_place(decided):
    layer = nk.BatchChannelNorm(6, num_groups=3).eval()
    layer.batch._example_weight = torch.full((4, 1), 0.5)
    layer(X.float())
    assert decided[0].reason.endswith("because every example has a weight of its own")


def test_all_take_their_decisions_from_there():
    ours = {name: module for name, module in sys.modules.items() if name.startswith("normkit.")}
    deciding = {name for name, module in ours.items() if hasattr(module, "decide")}
    assert all(ours[name].decide is select.decide for name in deciding)
    assert {module.__name__ for module in DECIDING} <= deciding
