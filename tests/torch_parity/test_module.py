"""What a layer is as a module: copies, devices, dtypes, replicas, sharing, substitution."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from torch_parity.pairs import BATCH, CLOSE, PAIRS, POSITIONS, values

EVERY = (*PAIRS, POSITIONS)
FLOAT = CLOSE[torch.float32]


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled])
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_copies(pair, copied):
    _, ours = pair.make()
    other, x = copied(ours.eval()), values(pair.shape, torch.float32)
    assert type(other) is type(ours)
    assert not other.training
    assert repr(other) == repr(ours)
    assert torch.equal(other(x), ours(x))


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_built_on_meta_then_filled(pair):
    for make in (pair.theirs, pair.ours):
        layer = make(6, device="meta")
        x = torch.empty(pair.shape, device="meta")
        assert layer(x).shape == x.shape
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        fresh, given = make(6), values(pair.shape, torch.float32)
        assert torch.equal(layer(given), fresh(given))


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_device_and_dtype_where_it_is_built(pair):
    for make in (pair.theirs, pair.ours):
        layer = make(6, dtype=torch.float64)
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        with torch.device("meta"):
            assert {p.device.type for p in make(6).parameters()} == {"meta"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for make in (pair.theirs, pair.ours) for p in make(6).parameters()} == {
            torch.float64
        }
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.type(torch.float64),
                                  lambda m: m.to(torch.float64)],
                         ids=["double", "type", "to"])  # fmt: skip
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_casts(pair, cast):
    theirs, ours = (cast(layer) for layer in pair.make())
    states = [{n: t.dtype for n, t in layer.state_dict().items()} for layer in (theirs, ours)]
    assert states[0] == states[1]
    x = values(pair.shape)
    assert_close(ours(x), theirs(x), **CLOSE[torch.float64])
    assert cast(ours) is ours


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_a_replica_shares_what_it_is_given(pair):
    """``DataParallel`` makes such: same parameters, buffers of its own device."""
    results = []
    for layer in pair.make():
        replica = layer._replicate_for_data_parallel()
        replica._buffers = dict(layer._buffers)
        for name, parameter in layer._parameters.items():  # as torch.nn.parallel.replicate does
            setattr(replica, name, parameter * 1)
        y = replica(values(pair.shape, torch.float32))
        y.pow(2).sum().backward()
        results.append([y, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_memory_can_be_shared(pair):
    results = []
    for layer in pair.make():
        layer.share_memory()
        assert all(t.is_shared() for t in [*layer.parameters(), *layer.buffers()])
        before = layer.running_mean.data_ptr()
        layer(values(pair.shape, torch.float32))
        assert layer.running_mean.data_ptr() == before  # moved in place, so others see it
        results.append(list(layer.buffers()))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, **FLOAT)


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_functional_call(pair):
    x = values(pair.shape, torch.float32)
    results = []
    for layer in pair.make():
        before = copy.deepcopy(layer.state_dict())
        given = {n: t.detach().clone() + 1 for n, t in layer.state_dict().items()}
        given |= {n: given[n].requires_grad_() for n, _ in layer.named_parameters()}
        y = functional_call(layer, given, (x,))
        grads = torch.autograd.grad(y.pow(2).sum(), [given[n] for n, _ in layer.named_parameters()])
        results.append([y, *grads, *(given[n] for n, _ in layer.named_buffers())])
        assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


class Exp(nn.Module):
    """A weight that is always positive."""

    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.log()


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_a_parametrised_weight(pair):
    x = values(pair.shape, torch.float32)
    results = []
    for layer in pair.make():
        expected = layer(x)
        nn.utils.parametrize.register_parametrization(layer, "weight", Exp())
        y = layer(x)
        assert_close(y, expected, **FLOAT)
        y.pow(2).sum().backward()
        results.append([layer.parametrizations.weight.original.grad, layer.bias.grad])
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        assert_close(layer(x), expected, **FLOAT)
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_parameters_put_in_anew(pair):
    x = values(pair.shape, torch.float32)
    theirs, ours = pair.make()
    for layer in (theirs, ours):
        layer.weight = nn.Parameter(torch.full((6,), 2.0))
        layer.bias = None
    assert_close(ours(x), theirs(x), **FLOAT)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_track_running_stats_switched_off_later(pair):
    for training in (True, False):
        theirs, ours = (layer.train(training) for layer in pair.make())
        x = values(pair.shape, torch.float32)
        for layer in (theirs, ours):
            layer.track_running_stats = False
        before = copy.deepcopy(theirs.state_dict())
        assert_close(ours(x), theirs(x), **FLOAT)
        for name, value in before.items():
            assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_statistics_taken_away_later(pair):
    x = values(pair.shape, torch.float32)
    for training in (True, False):
        theirs, ours = (layer.train(training) for layer in pair.make())
        for layer in (theirs, ours):
            layer.running_mean = layer.running_var = None
        assert_close(ours(x), theirs(x), **FLOAT)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_resets(pair):
    for layer in pair.make():
        layer(values(pair.shape, torch.float32))
        layer.reset_running_stats()
        assert layer.running_mean.tolist() == [0.0] * 6
        assert layer.running_var.tolist() == [1.0] * 6
        assert layer.num_batches_tracked == 0
        layer.reset_parameters()
        assert layer.weight.tolist() == [1.0] * 6
        assert layer.bias.tolist() == [0.0] * 6


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_hooks_see_what_goes_in_and_out(pair):
    seen = []
    x = values(pair.shape, torch.float32).requires_grad_()
    for layer in pair.make():
        layer.register_forward_pre_hook(lambda m, given: seen.append(given[0].shape))
        layer.register_forward_hook(lambda m, given, y: y + 1)
        layer.register_full_backward_hook(lambda m, dx, dy: seen.append(dx[0].shape))
        layer(x).sum().backward()
    assert seen == [x.shape] * 4


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_a_single_value_in_a_group_is_refused_in_training(pair):
    shape = (1, 6, *(1 for _ in pair.shape[2:]))
    if pair.name in ("gn", "gn-dense", "ln", "pn"):
        return  # their groups have several channels
    for layer in pair.make():
        with pytest.raises(ValueError, match=r"Expected more than 1|expected more than 1"):
            layer(torch.ones(shape))
