"""What is put back, whatever was done, and though it is interrupted meanwhile."""

import gc
import random
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fuzz.interruption import Lines
from fuzz.wholeness import differences, state_of
from normkit.passes import (
    Hooks,
    all_or_nothing,
    attempt,
    block_with_cleanup,
    call_with_cleanup,
    changes_nothing,
    run_cleanup,
    untouched,
)
from normkit.passes.settings import save_settings
from normkit.passes.snapshot import Snapshot


def bench():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    model[0].register_forward_hook(lambda *_: None)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], momentum=0.9)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return model, optimizer


class Other(nn.Conv2d):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def reorder(held):
    first = next(iter(held))
    held[first] = held.pop(first)


def forget_memory(model, optimizer):
    model[0].weight.data = torch.zeros(4, 3, 1, 1)


def add_class_and_attribute(model, optimizer):
    model[0].__class__ = Other
    model[0].late, model[0].stride = 1, 2


def freeze(model, optimizer):
    model[0].weight.requires_grad_(False)
    model[1].bias.grad, model[0].weight.grad = torch.ones(4), None


def exchange_buffers(model, optimizer):
    model[1].running_mean += 1
    model[1].running_var = torch.zeros(4)
    model[1].late = nn.Buffer(torch.zeros(1))
    model[1]._non_persistent_buffers_set.add("running_mean")


def change_optimizer(model, optimizer):
    optimizer.param_groups[0]["params"].pop(1)
    optimizer.param_groups[0]["lr"] = 3
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    reorder(optimizer.state)
    next(iter(optimizer.state.values()))["late"] = 1
    optimizer.step = None


def set_torch_otherwise(model, optimizer):
    torch.set_grad_enabled(False)
    Mode().__enter__()
    torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - what old loaders draw from


DAMAGE = {
    "modes": lambda model, _: model.eval(),
    "parameters in another order": lambda model, _: reorder(model[0]._parameters),
    "buffers in another order": lambda model, _: reorder(model[1]._buffers),
    "children in another order": lambda model, _: reorder(model._modules),
    "hooks": lambda model, _: model[0].register_forward_pre_hook(print, with_kwargs=True),
    "no hooks": lambda model, _: model[0]._forward_hooks.clear(),
    "memory": forget_memory,
    "class and attributes": add_class_and_attribute,
    "gradients": freeze,
    "buffers": exchange_buffers,
    "the optimizer": change_optimizer,
    "torch": set_torch_otherwise,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_everything_is_put_back_and_objects_are_the_same(kind):
    model, optimizer = bench()
    before, snapshot = state_of(model, optimizer), Snapshot(model, optimizer)
    DAMAGE[kind](model, optimizer)
    assert differences(before, state_of(model, optimizer))
    snapshot.put_back()
    assert differences(before, state_of(model, optimizer)) == []
    snapshot.put_back()
    assert differences(before, state_of(model, optimizer)) == []


def test_a_lazy_layer_does_not_know_its_size_again():
    model = nn.Sequential(nn.LazyConv2d(4, 1, bias=False), nn.LazyBatchNorm2d())
    parameters = list(model.parameters())
    snapshot = Snapshot(model)
    model(torch.randn(2, 3, 2, 2))
    snapshot.put_back()
    assert [type(layer) for layer in model] == [nn.LazyConv2d, nn.LazyBatchNorm2d]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(map(nn.parameter.is_lazy, parameters))
    assert nn.parameter.is_lazy(model[1].running_mean)
    model(torch.randn(2, 5, 2, 2))
    assert model[0].weight.shape == (4, 5, 1, 1)


def test_what_has_not_changed_is_not_written():
    model, optimizer = bench()
    model[1].running_mean[0] = float("nan")
    versions = [tensor._version for tensor in model.state_dict().values()]
    Snapshot(model, optimizer).put_back()
    assert versions == [tensor._version for tensor in model.state_dict().values()]


def test_a_way_back_that_python_takes_late_does_nothing():
    model, _ = bench()
    outer = Snapshot(model)
    inner = untouched(model, training=False)
    inner.__enter__()  # and Ctrl-C comes before its block
    outer.put_back()
    model[1].momentum = 0.3
    del inner
    gc.collect()
    assert model[1].momentum == 0.3
    with untouched(model, training=False), untouched(model):
        assert not model.training
    assert model.training


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.count = nn.BatchNorm1d(3), 0

    def forward(self, x):
        self.count += 1
        return self.norm(x)


def test_what_a_forward_counts_goes_on_within_a_tool_and_is_put_back_by_it():
    model = Counting()

    @changes_nothing
    def look_twice(model):
        for _ in range(2):
            with untouched(model, training=True):
                model(torch.randn(4, 3))
                model.norm.momentum = 0.3
        return model.count, model.norm.momentum, model.norm.num_batches_tracked.item()

    assert look_twice(model) == (2, 0.1, 0)
    assert model.count == 0


def test_values_of_small_parameters_are_put_back():
    model, _ = bench()
    before = model[1].weight.detach().clone()
    snapshot = Snapshot(model)
    with torch.no_grad():
        model[1].weight.fill_(3)
    snapshot.put_back()
    assert torch.equal(model[1].weight, before)


def test_values_of_other_parameters_are_put_back_where_that_is_asked_for():
    model, _ = bench()
    weight = model[0].weight
    before, snapshot = weight.detach().clone(), Snapshot(model, values=[weight])
    with torch.no_grad():
        weight.fill_(3)
    snapshot.put_back()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_at_any_line_of_the_way_back_is_raised_when_that_is_done(error):
    model, optimizer = bench()
    before = state_of(model, optimizer)

    def fails():
        for damage in [each for kind, each in DAMAGE.items() if "children" not in kind]:
            damage(model, optimizer)
        raise ValueError("in the middle")

    def interrupted(lines):
        with pytest.raises((error, ValueError)) as raised:
            lines.run(lambda: attempt(fails, model, optimizer))
        return raised.type

    lines = Lines()
    assert interrupted(lines) is ValueError
    assert differences(before, state_of(model, optimizer)) == []
    places = {(*place, n) for place, number in lines.seen.items() for n in (1, number)}
    hits = 0
    for at in sorted(places):
        lines = Lines(at, error("injected"))
        assert interrupted(lines) is (error if lines.hit else ValueError)
        hits += lines.hit
        assert differences(before, state_of(model, optimizer)) == [], at
    assert hits > 0.9 * len(places)  # how often a line runs is up to the garbage collector


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("inside", [None, ValueError("in the block")], ids=repr)
def test_an_interruption_at_any_line_of_a_pass_leaves_the_model_as_it_was(error, inside):
    model, optimizer = bench()
    model[1].eval()
    before = state_of(model, optimizer)

    def look():
        with untouched(model, training=True):
            model(torch.randn(2, 3, 2, 2))
            if inside is not None:
                raise inside

    def interrupted(lines):
        try:
            lines.run(look)
        except (error, ValueError) as raised:
            return type(raised)

    lines = Lines()
    interrupted(lines)
    places = {(*place, n) for place, number in lines.seen.items() for n in (1, number)}
    hits = 0
    for at in sorted(places):
        lines = Lines(at, error("injected"))
        assert (interrupted(lines) is error) == lines.hit
        hits += lines.hit
        assert differences(before, state_of(model, optimizer)) == [], at
    assert hits > 0.9 * len(places)


def test_steps_that_fail_are_repeated_and_ctrl_c_is_told_first():
    done, errors = [], [RuntimeError("no"), KeyboardInterrupt("now"), RuntimeError("no")]

    def step():
        if errors:
            raise errors.pop(0)
        done.append("step")

    with pytest.raises(KeyboardInterrupt, match="now"):
        run_cleanup([step, lambda: done.append("other")])
    assert sorted(done) == ["other", "step"]


def test_a_step_that_always_fails_does_not_keep_the_others_from_being_done():
    done = []

    def fails():
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        run_cleanup([lambda: done.append(1), *[fails] * 300, lambda: done.append(2)])
    assert done == [1, 2]


def test_the_end_comes_once_after_success_and_after_half_of_the_beginning():
    said = []
    with block_with_cleanup(lambda: said.append("begin"), lambda: said.append("end")):
        said.append("block")
    assert call_with_cleanup(lambda: said.append("work"), lambda: said.append("end")) is None
    assert said == ["begin", "block", "end", "work", "end"]

    def half():
        said.append("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), block_with_cleanup(half, lambda: said.append("end")):
        said.append("never")
    assert said[5:7] == ["half", "end"]
    assert "never" not in said


def test_a_function_undoes_what_it_did_if_it_raises_or_always():
    model, _ = bench()

    def evaluate(model, error=None):
        """Set the mode."""
        model.eval()
        if error:
            raise error
        return "done"

    with pytest.raises(SystemExit):
        all_or_nothing(evaluate)(model, error=SystemExit())
    assert model.training
    assert changes_nothing(evaluate)(model=model) == "done"
    assert model.training
    assert all_or_nothing(evaluate)(model) == "done"
    assert not model.training
    assert changes_nothing(evaluate).__doc__ == "Set the mode."


def test_hooks_are_taken_out_and_those_of_others_stay():
    layer, hooks, called = nn.Identity(), Hooks(), []
    layer.register_forward_hook(lambda *_: called.append("theirs"))
    before = {key: list(value) for key, value in vars(layer).items() if "hooks" in key}
    hooks.before(layer, lambda *_, **__: called.append("before"), with_kwargs=True)
    hooks.after(layer, lambda *_: called.append("after"), always_call=True, prepend=True)
    layer(torch.zeros(1))
    assert called == ["before", "after", "theirs"]
    hooks.remove()
    hooks.remove()
    assert {key: list(value) for key, value in vars(layer).items() if "hooks" in key} == before


@contextmanager
def late(said):
    try:
        yield
    finally:
        said.append("late")


def test_a_context_that_was_left_suspended_ends_before_things_are_put_back():
    said = []

    def interrupted(frame, event, arg):
        is_exit = frame.f_code.co_name == "__exit__" and "contextlib" in frame.f_code.co_filename
        if is_exit and not said:
            said.append("interrupted")
            raise KeyboardInterrupt

    def work():
        with late(said):
            sys.settrace(interrupted)

    tracer = sys.gettrace()
    try:
        with pytest.raises(KeyboardInterrupt):
            call_with_cleanup(work, lambda: said.append("put back"))
    finally:
        sys.settrace(tracer)
    assert said[:3] == ["interrupted", "late", "put back"]


@pytest.mark.parametrize("is_of_the_thread", [False, True], ids=["torch 2.13", "torch 2.14"])
def test_that_torch_fx_traces_is_put_back_where_each_torch_keeps_it(monkeypatch, is_of_the_thread):
    fx = sys.modules["torch.fx._symbolic_trace"]
    monkeypatch.setattr(fx, "_is_fx_tracing_flag", False, raising=False)
    monkeypatch.delattr(fx, "_is_fx_tracing_tls", raising=False)
    home, name = fx, "_is_fx_tracing_flag"
    if is_of_the_thread:
        home, name = threading.local(), "flag"
        monkeypatch.setattr(fx, "_is_fx_tracing_tls", home, raising=False)
    steps = save_settings()
    setattr(home, name, True)
    run_cleanup(steps)
    assert getattr(home, name) is False
