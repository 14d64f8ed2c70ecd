"""Accumulated running statistics against those of all values at once, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from cases import EVERY, randn

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZES = (4, 1, 3)
BATCHES = [randn(size, 6, 5, 3, seed=size, mean=size, std=size) for size in SIZES]
TRACKED = [case for case in EVERY if case.tracks and case.name != "bcn-micro"]
GROUPS = {"bgn": 2, "bgn-cuts": 9, "bgn-weighed": 9}


def followed(values, old, rate):
    """Buffers after one batch with these values of each group, ``(G, n)``."""
    mean, var = old
    return mean + rate * (values.mean(1) - mean), var + rate * (values.var(1) - var)


def groups_of(x, num_groups):
    return x.reshape(len(x), num_groups, -1).transpose(0, 1).flatten(1)


def buffers(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("make", [nn.BatchNorm2d, nk.BatchNorm, nk.GhostBatchNorm])
def test_buffers_move_once_as_for_all_inputs_at_once(make, momentum):
    layer = make(6, momentum=momentum).double()
    layer(randn(5, 6, 2, 2))
    old = buffers(layer)
    with nk.accumulate_statistics(layer, steps=3) as pending:
        for index, x in enumerate(BATCHES):
            assert pending.num_pending == index
            layer(x).sum().backward()
            assert index == 2 or all(map(torch.equal, buffers(layer), old))
    rate = 1 / 2 if momentum is None else momentum
    expected = followed(groups_of(torch.cat(BATCHES), 6), old, rate)
    assert_close(buffers(layer), expected, **CLOSE)
    assert (layer.num_batches_tracked, layer.momentum) == (2, momentum)


@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_every_layer_is_as_if_it_had_seen_the_whole(case):
    """Statistics of what each layer tracks; composites that track their input are in it too."""
    layer, plain = case.make(dtype=torch.float64), case.make(dtype=torch.float64)
    outputs = []
    with nk.accumulate_statistics(layer, steps=3):
        outputs = [layer(x) for x in BATCHES]
    for x, y in zip(BATCHES, outputs, strict=True):
        assert_close(plain(x), y, **CLOSE)  # each normalises by its own batch
    whole = case.make(dtype=torch.float64)
    whole(torch.cat(BATCHES))
    for name, value in whole.named_buffers():
        assert_close(layer.get_buffer(name), value, **CLOSE)


class Twice(nn.Module):
    """A norm that is called twice, and another one that is called sometimes."""

    def __init__(self):
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(6), nk.BatchNorm(6)

    def forward(self, x, other=True):
        y = self.norm(x) + self.norm(2 * x + 1)
        return y + self.other(x) if other else y


def test_a_layer_that_is_called_twice_moves_twice():
    model = Twice().double()
    old, other = buffers(model.norm), buffers(model.other)
    with nk.accumulate_statistics(model, steps=2):
        for x, asked in zip(BATCHES[:2], (True, False), strict=True):
            model(x, asked)
    x = torch.cat(BATCHES[:2])
    first = followed(groups_of(x, 6), old, 0.1)
    assert_close(buffers(model.norm), followed(groups_of(2 * x + 1, 6), first, 0.1), **CLOSE)
    assert_close(buffers(model.other), followed(groups_of(BATCHES[0], 6), other, 0.1), **CLOSE)
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [nn.BatchNorm2d, nk.BatchNorm])
def test_a_checkpoint_counts_once(make, reentrant):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = make(6)

        def forward(self, x):
            return checkpoint(self.norm, x, use_reentrant=reentrant)

    model, xs = Inside().double(), [x.clone().requires_grad_() for x in BATCHES]
    with nk.accumulate_statistics(model, steps=3):
        for x in xs:
            model(x).pow(2).sum().backward()
    expected = followed(groups_of(torch.cat(BATCHES), 6), (torch.zeros(6), torch.ones(6)), 0.1)
    assert_close(buffers(model.norm), expected, check_dtype=False, **CLOSE)
    assert model.norm.num_batches_tracked == 1


def test_gradients_are_those_without_it():
    model = nn.Sequential(nn.BatchNorm2d(6), nk.BatchChannelNorm(6, num_groups=3)).double()
    plain = copy.deepcopy(model)
    with nk.accumulate_statistics(model, steps=3):
        sum(model(x).pow(3).sum() for x in BATCHES).backward()  # all forwards before
    sum(plain(x).pow(3).sum() for x in BATCHES).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, **CLOSE)


def test_evaluation_and_parts_called_alone_are_as_ever():
    model = nn.Sequential(nk.BatchNorm(6), nn.ReLU()).double()
    pending = nk.accumulate_statistics(model, steps=2)
    model.eval()(BATCHES[0])
    assert pending.num_pending == 0
    model.train()[0](BATCHES[0])
    assert (pending.num_pending, model[0].num_batches_tracked) == (0, 1)
    pending.remove()


def test_leaving_the_block_follows_what_is_pending():
    layer = nk.BatchNorm(6).double()
    old = buffers(layer)
    with nk.accumulate_statistics(layer, steps=3):
        layer(BATCHES[0])
    assert_close(buffers(layer), followed(groups_of(BATCHES[0], 6), old, 0.1), **CLOSE)


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if len(x) == 1:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ZeroDivisionError("now"), KeyboardInterrupt("now")], ids=repr)
@pytest.mark.parametrize("inside", [True, False], ids=["in a norm", "after a norm"])
def test_an_exception_leaves_no_hook_and_drops_what_is_pending(error, inside, monkeypatch):
    norm, failing = nn.BatchNorm2d(6), Failing(error)
    if inside:
        monkeypatch.setattr(norm, "_check_input_dim", failing.forward)
    model = nn.Sequential(norm, failing).double()
    before, hooks = copy.deepcopy(model.state_dict()), hooks_of(model)
    objects = dict(norm._buffers)
    with pytest.raises(type(error), match="now"):
        accumulate_over(model, BATCHES)
    assert hooks_of(model) == hooks
    assert all(norm._buffers[name] is value for name, value in objects.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert norm.momentum == 0.1


def accumulate_over(model, batches):
    with nk.accumulate_statistics(model, steps=len(batches)):
        for x in batches:
            model(x)


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_what_raised_does_not_count():
    model = nn.Sequential(nk.BatchNorm(6), Failing(ZeroDivisionError("now"))).double()
    old = buffers(model[0])
    with nk.accumulate_statistics(model, steps=2) as pending:
        model(BATCHES[0])
        with pytest.raises(ZeroDivisionError, match="now"):
            model(BATCHES[1])
        assert pending.num_pending == 1
        model(BATCHES[2])
    values = groups_of(torch.cat([BATCHES[0], BATCHES[2]]), 6)
    assert_close(buffers(model[0]), followed(values, old, 0.1), **CLOSE)


def test_what_cannot_wait_is_named_with_the_reason():
    model = nn.Sequential(
        nn.BatchNorm2d(6),
        nk.BatchChannelNorm(6, num_groups=3, micro_batch=True),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nk.BatchNorm(6),
    )
    nk.freeze_statistics(model, where=lambda _, name: name == "3")
    pending = nk.accumulate_statistics(model, 2)
    pending.remove()
    assert pending.names == ("0",)
    assert pending.left == {
        "1.batch": "it normalises by its running estimates in training",
        "2": "it is torch's instance norm, which averages examples; convert_norm_ replaces it",
        "3": "its statistics are frozen",
    }


@pytest.mark.parametrize(
    ("model", "steps", "message"),
    [
        (nn.Linear(2, 2), 2, r"no layer whose running statistics can be accumulated; norms of"),
        (nn.InstanceNorm2d(6, track_running_stats=True), 2, r"\(the model itself: it is torch's"),
        (nk.BatchNorm(6), 0, r"steps=0"),
        (torch.compile(nk.BatchNorm(6)), 2, r"the model is compiled"),
        (nn.Sequential(nn.LazyBatchNorm2d()), 2, r"'0' .* does not know its number of channels"),
    ],
    ids=["no norm", "left", "steps", "compiled", "lazy"],
)
def test_it_is_refused_in_words(model, steps, message):
    with pytest.raises(nk.OptionError, match=message):
        nk.accumulate_statistics(model, steps)


def test_once_at_a_time():
    model = nn.Sequential(nk.BatchNorm(6))
    with nk.accumulate_statistics(model, 2):
        for part in (model, model[0]):
            with pytest.raises(nk.OptionError, match="accumulated already; end that"):
                nk.accumulate_statistics(part, 2)
    nk.accumulate_statistics(model, 2).remove()


def test_a_model_may_be_compiled_afterwards():
    model = nn.Sequential(nn.BatchNorm2d(6), nk.BatchNorm(6)).double()
    plain = copy.deepcopy(model)
    with nk.accumulate_statistics(model, steps=3):
        compiled = torch.compile(model, backend="aot_eager")
        for x in BATCHES:
            compiled(x)
    with nk.accumulate_statistics(plain, steps=3):
        for x in BATCHES:
            plain(x)
    for name, value in plain.named_buffers():
        assert_close(model.get_buffer(name), value, **CLOSE)
