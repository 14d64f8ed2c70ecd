"""When running statistics are updated, by how much, and how precisely."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
import oracle
from cases import EVERY, groups, randn, statistics
from values import arrange, buffers_of, in_float64

pytestmark = pytest.mark.usefixtures("kernels")
TRACKED = [case for case in EVERY if case.tracks]
WITH_MOMENTUM = [case for case in TRACKED if case.kind != "bcn-micro"]
OFFSETS = (0.0, 1000.0, -1000.0, 500.0, 30.0, -2.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(8, 6, 5, 3), (8, 6, 20, 18), (2, 6, 48, 47)], ids=str)
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_channels_far_from_each_other_keep_their_digits(case, shape, layout, kernels):
    layer = case.make(dtype=torch.float32)
    std = 0.1
    x = randn(*shape, dtype=torch.float64) * std + torch.tensor(OFFSETS).view(1, 6, 1, 1)
    x = arrange(x.float(), layout)
    statistics(layer).running_var.zero_()  # else 0.9 of the 1 there would hide the new value
    before = buffers_of(case, layer)
    layer(x)
    wanted = oracle.follow(
        case.kind, x.double(), before, in_float64(layer), layer.eps, **groups(case)
    )
    # The reference kernels keep means in float32, as far as 1000 from 0.
    digits = 2e-6 if kernels == "cpu" else 32 * 1000 / std * torch.finfo(torch.float32).eps
    for ours, theirs in zip(buffers_of(case, layer), wanted, strict=True):
        assert_close(ours, theirs, rtol=digits, atol=1e-5 if ours is not None else 0)
    ours, theirs = buffers_of(case, layer)[1], wanted[1]
    assert_close(ours / theirs, torch.ones_like(theirs), rtol=0, atol=digits)


@pytest.mark.parametrize("case", WITH_MOMENTUM, ids=str)
def test_momentum_none_averages_to_the_last_digit_of_float64(case):
    layer = case.make(dtype=torch.float64, momentum=None)
    batches = [randn(4, 6, 5, 3, seed=seed) + 5 for seed in range(3)]
    zero = tuple(torch.zeros_like(t) for t in buffers_of(case, layer))
    moved = []
    for x in batches:
        layer(x)
        new = oracle.follow(case.kind, x, zero, in_float64(layer), layer.eps, **groups(case))
        moved.append([t / 0.1 for t in new])  # the oracle's momentum is 0.1
    for ours, theirs in zip(buffers_of(case, layer), zip(*moved, strict=True), strict=True):
        assert_close(ours, torch.stack(theirs).mean(dim=0), rtol=4e-15, atol=4e-15)


@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_tracking_switched_off_later_freezes_the_statistics(case):
    layer = case.make()
    layer(randn(4, 6, 5, 3, dtype=torch.float32))
    expected = case.make()
    expected.load_state_dict(layer.state_dict())
    expected.eval()
    statistics(layer).track_running_stats = False
    before = buffers_of(case, layer)
    x = randn(4, 6, 5, 3, seed=1, dtype=torch.float32)
    y = layer(x)
    for ours, theirs in zip(buffers_of(case, layer), before, strict=True):
        assert torch.equal(ours, theirs)
    assert statistics(layer).num_batches_tracked == 1
    if case.kind != "bcn-micro":  # it normalises by the estimates, which stand still
        assert_close(y, case_in_training(case, expected, x))
    assert torch.equal(layer.eval()(x), expected(x))


def case_in_training(case, like, x):
    """What a fresh layer with these parameters gives in training."""
    layer = case.make()
    layer.load_state_dict(like.state_dict())
    return layer.train()(x)


def test_tracking_switched_off_later_is_as_in_torch():
    ours, theirs = nk.BatchNorm(6), nn.BatchNorm2d(6)
    for training, tracking in ((True, True), (True, False), (False, False), (True, True)):
        x = randn(4, 6, 5, 3, seed=training + 2 * tracking, dtype=torch.float32)
        results = []
        for layer in (ours, theirs):
            layer.train(training)
            layer.track_running_stats = tracking
            results.append(layer(x))
        assert_close(*results, atol=2e-5, rtol=2e-5)
        for name, buffer in theirs.named_buffers():
            assert_close(ours.get_buffer(name), buffer)


def test_estimates_of_micro_batches_stand_still_while_tracking_is_off():
    layer = nk.BatchChannelNorm(6, num_groups=2, micro_batch=True)
    layer.batch.track_running_stats = False
    x = randn(2, 6, 5, 3, dtype=torch.float32, mean=3.0)
    y = layer(x)
    parameters = in_float64(layer)
    running = (torch.zeros(6), torch.ones(6))
    wanted = oracle.evaluate("bcn", x.double(), parameters, layer.eps, running, 0, num_groups=2)
    assert_close(y.double(), wanted, atol=2e-5, rtol=2e-5)
    assert layer.batch.running_mean.eq(0).all()
    assert layer.batch.num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("case", WITH_MOMENTUM, ids=str)
def test_buffers_without_a_count_are_buffers(case, momentum):
    counted, layer = case.make(), case.make()
    statistics(layer).num_batches_tracked = None
    for each in (counted, layer):
        each.momentum = momentum
        each(randn(4, 6, 5, 3, dtype=torch.float32))
    moves = momentum is not None  # as in torch: without a count there is no average
    assert torch.equal(statistics(layer).running_mean, statistics(counted).running_mean) == moves
    statistics(layer).load_state_dict(
        {k: v for k, v in statistics(counted).state_dict().items() if "num_batches" not in k},
        strict=False,
    )
    x = randn(4, 6, 5, 3, seed=1, dtype=torch.float32)
    assert torch.equal(layer.eval()(x), counted.eval()(x))


def test_half_of_the_statistics_is_refused():
    layer = nk.BatchNorm(6)
    layer.running_var = None
    with pytest.raises(nk.OptionError, match="one of running_mean and running_var, and the other"):
        layer(torch.ones(4, 6, 3))
