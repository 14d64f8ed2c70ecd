"""A weight that one forward uses several times is computed once, and every gradient is right."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit import weights
from normkit.core import normalize as core
from normkit.weights.attach import rules_of

ATTACH = {
    "ws": nk.standardize_weights_,
    "preserve": lambda model: nk.standardize_weights_(model, preserve=True),
    "wn": weights.weight_norm_,
    "cwn": weights.centered_weight_norm_,
}


class Head(nn.Module):
    """One convolution for several maps, as in detection."""

    def __init__(self, mode=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.mode = mode

    def step(self, x):
        """One use."""
        return torch.tanh(self.norm(self.conv(x)))

    def forward(self, x):
        """Three uses, the second by a checkpoint, or without a gradient, or failing, if asked."""
        x = self.step(x)
        if self.mode == "fail":
            raise RuntimeError("in the middle")
        if self.mode == "no_grad first":
            with torch.no_grad():
                self.step(x)
        if isinstance(self.mode, bool):
            x = checkpoint(self.step, x, use_reentrant=self.mode)
        else:
            x = self.step(x)
        return self.step(x)


@pytest.fixture
def computed(monkeypatch):
    """List that grows by one with every weight that is computed."""
    calls, measure = [], core.measure
    monkeypatch.setattr(core, "measure", lambda *a: calls.append(1) or measure(*a))
    return calls


def pair(attach, mode=None):
    """Twins, of which only the first keeps what it has computed."""
    torch.manual_seed(0)
    model = Head()
    attach(model)
    twin = copy.deepcopy(model)
    for rule in rules_of(twin.conv):
        rule.cache = None
    model.mode = twin.mode = mode
    return model, twin


def gradients(model, losses):
    for loss in losses:
        loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("attach", ATTACH.values(), ids=list(ATTACH))
def test_three_uses_cost_one(attach, computed):
    model, twin = pair(attach)
    x = torch.randn(2, 4, 5, 5)
    computed.clear()
    y = model(x)
    assert len(computed) == 1
    model(x)
    assert len(computed) == 2  # the next forward computes again
    assert_close(y, twin(x))
    assert_close(gradients(model, [y.square().sum()]), gradients(twin, [twin(x).square().sum()]))


@pytest.mark.parametrize("mode", [None, True, False, "no_grad first"])
def test_gradients_are_right_however_backward_comes(mode):
    model, twin = (net.double() for net in pair(ATTACH["preserve"], mode))
    xs = [torch.randn(2, 4, 5, 5, requires_grad=True, dtype=torch.float64) for _ in range(2)]

    def accumulated(net):
        return [g for x in xs for g in gradients(net, [net(x).square().sum()])]

    def two_forwards_first(net):
        return gradients(net, [y.square().sum() for y in [net(x) for x in xs]])

    assert_close(accumulated(model), accumulated(twin))
    assert_close(two_forwards_first(model), two_forwards_first(twin))


def test_uses_of_one_forward_go_backward_one_by_one():
    """A kept graph would have been freed by the first."""
    model, twin = pair(ATTACH["ws"])

    class Siamese(Head):
        def forward(self, x):
            """Return the result for each half."""
            return self.step(x[:1]), self.step(x[1:])

    x = torch.randn(2, 4, 5, 5)
    for net in (model, twin):
        net.__class__ = Siamese
    found, expected = ([y.sum() for y in net(x)] for net in (model, twin))
    assert_close(gradients(model, found), gradients(twin, expected))


def test_second_derivatives():
    model, twin = pair(ATTACH["preserve"])
    model, twin, x = model.double(), twin.double(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for net in (model, twin):
        params = list(net.parameters())
        first = torch.autograd.grad(net(x).square().sum(), params, create_graph=True)
        sum(g.square().sum() for g in first).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(one.grad, other.grad)


def test_nothing_is_kept_after_a_forward_even_one_that_fails(computed):
    model, twin = pair(ATTACH["ws"], "fail")
    x = torch.randn(2, 4, 5, 5)
    cache = rules_of(model.conv)[0].cache
    with pytest.raises(RuntimeError, match="in the middle"):
        model(x)
    assert not cache._by_thread
    model.mode = twin.mode = None
    model(x)
    assert not cache._by_thread
    model.conv.parametrizations.weight.original.data.add_(torch.randn(4, 4, 3, 3))
    twin.load_state_dict(model.state_dict())
    assert_close(model(x), twin(x))


def test_a_weight_that_changes_during_a_forward_is_computed_again(computed):
    model, _ = pair(ATTACH["ws"])

    def change(module, args, output):
        with torch.no_grad():
            module.parametrizations.weight.original.mul_(2).add_(torch.randn(4, 4, 3, 3))

    model.conv.register_forward_hook(change)
    computed.clear()
    with torch.no_grad():
        model(torch.randn(2, 4, 5, 5))
    assert len(computed) == 3


def test_parts_without_the_root_and_inference_mode_are_right(computed):
    model, twin = pair(ATTACH["ws"])
    x = torch.randn(2, 4, 5, 5)
    assert_close(model.step(x), twin.step(x))
    with torch.inference_mode():
        assert_close(model(x), twin(x))
    assert_close(gradients(model, [model(x).sum()]), gradients(twin, [twin(x).sum()]))


def test_threads_have_forwards_of_their_own():
    model, twin = pair(ATTACH["ws"])
    xs = [torch.randn(2, 4, 5, 5) for _ in range(4)]
    found = [None] * len(xs)

    def work(i):
        for _ in range(10):
            found[i] = model(xs[i]).detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(found, [twin(x).detach() for x in xs])


def test_copies_keep_for_themselves_and_baking_takes_the_hooks_off(computed):
    model, _ = pair(ATTACH["ws"])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.conv.parametrizations.weight.original.add_(torch.randn(4, 4, 3, 3))
    x = torch.randn(2, 4, 5, 5)
    computed.clear()
    assert not torch.allclose(model(x), copied(x))
    assert len(computed) == 2
    for net in (copied, model):
        nk.bake_weights_(net)
        assert not net._forward_hooks
        assert not net._forward_pre_hooks


def test_layers_that_are_used_once_need_no_hooks():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
    nk.standardize_weights_(model)
    assert not model._forward_hooks
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.GroupNorm(2, 4), shared, nn.GroupNorm(2, 4))
    assert nk.standardize_weights_(model).changed == ("0",)
    assert model._forward_hooks


def test_it_compiles(computed):
    model, twin = pair(ATTACH["ws"])
    x = torch.randn(2, 4, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert_close(y, twin(x))
    assert_close(gradients(model, [y.sum()]), gradients(twin, [twin(x).sum()]))
