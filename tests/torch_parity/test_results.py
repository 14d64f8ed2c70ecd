"""Results, gradients and buffers are those of torch's layers, in all that torch's tests try."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import normkit as nk
from torch_parity.pairs import BATCH, CLOSE, PAIRS, POSITIONS, gradients, values

EVERY = (*PAIRS, POSITIONS)
OPTIONS = (
    {},
    {"affine": False},
    {"bias": False},
    {"eps": 1e-3},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)


def same(pair, options, x, grad=None):
    """Two training steps and one at evaluation: everything that torch's layer gives, ours does."""
    theirs, ours = pair.make(**options)
    grad = values(x.shape, x.dtype, seed=1) if grad is None else grad
    tolerance = CLOSE[x.dtype]
    for training in (True, True, False):
        theirs.train(training)
        ours.train(training)
        (y, found), (expected, wanted) = gradients(ours, x, grad), gradients(theirs, x, grad)
        assert_close(y, expected, **tolerance)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, **tolerance)
        for name, buffer in theirs.named_buffers():
            assert_close(ours.get_buffer(name), buffer, **tolerance)


def takes(pair, options):
    """Whether torch's layer has these options."""
    given = set(options)
    if pair in BATCH:
        return True
    if pair is POSITIONS:
        return given <= {"eps", "bias"}
    if pair.name.startswith("in"):
        return given <= {"eps", "affine", "bias"}
    return given <= {"eps", "affine", "bias"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_each_option_means_the_same(pair, options):
    if not takes(pair, options):
        return
    if "bias" in options and not has_bias_option():
        pytest.skip("this torch has no bias= for norms")
    same(pair, options, values(pair.shape).float())


def has_bias_option():
    try:
        nn.BatchNorm2d(1, bias=False)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_sixteen_bits_with_parameters_of_32_or_16(pair, dtype):
    """Sums are at least float32, where torch's may be 16 bits: ours are its exact ones, rounded."""
    x, grad = values(pair.shape, dtype), values(pair.shape, dtype, seed=1)
    for parameters in (torch.float32, dtype):
        theirs, ours = (layer.to(parameters) for layer in pair.make())
        exact = copy.deepcopy(theirs).double()
        expected, wanted = gradients(exact, x.double(), grad.double())
        y, found = gradients(ours, x, grad)
        for one, other in zip((y, *found), (expected, *wanted), strict=True):
            rounding = torch.finfo(one.dtype).eps / 2
            tolerance = {"rtol": rounding + 1e-5, "atol": 1e-5}  # and those of float32
            assert_close(one.double(), other, **tolerance)
        try:
            with_torch, theirs = gradients(theirs, x, grad)
        except RuntimeError:  # some of torch's take no mixture on the CPU
            assert parameters != dtype
            continue
        dtypes = [t.dtype for t in (with_torch, *theirs)]
        assert [t.dtype for t in (y, *found)] == dtypes


LAYOUTS = {
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "stepped": lambda x: torch.stack([x, x], dim=1).flatten(0, 1)[::2],
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "overlapping": lambda x: x.flatten(-2)[..., : sum(x.shape[-2:]) - 1].unfold(-1, x.shape[-1], 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_memory_of_the_input_and_of_the_gradient(pair, layout):
    x, grad = (LAYOUTS[layout](values(pair.shape, torch.float32, seed)) for seed in (0, 1))
    if layout != "expanded" or x.ndim > 2:  # all examples equal: torch's own rounding is 1e-4 there
        same(pair, {}, x)
    same(pair, {}, values(pair.shape, torch.float32), grad)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_channels_last_stays(pair):
    x = LAYOUTS["channels_last"](values(pair.shape, torch.float32)).requires_grad_()
    _, ours = pair.make()
    y = ours(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_second_derivatives(pair, training):
    theirs, ours = (layer.double().train(training) for layer in pair.make())
    x = values(pair.shape).requires_grad_()
    results = []
    for layer in (theirs, ours):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.pow(2).sum(), (x, *layer.parameters()),
                                           allow_unused=True))  # fmt: skip
    for one, other in zip(*results, strict=True):
        if one is None or other is None:
            assert one is None or not one.any()
            assert other is None or not other.any()
            continue
        assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("pair", [BATCH[1], PAIRS[7]], ids=str)
def test_gradients_are_those_of_small_differences(pair):
    _, ours = pair.make()
    ours.double()
    if pair.tracks:
        ours.momentum = 0.0
    x = values((3, 6, 2)).requires_grad_()
    assert gradcheck(ours, (x,))
    assert gradgradcheck(ours, (x,))


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_autocast_does_what_it_does_to_torchs(pair):
    theirs, ours = pair.make()
    x = values(pair.shape, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16()):
            y, expected = ours(given), theirs(given)
            assert y.dtype == given.dtype
            assert_close(y.float(), expected.float(), **CLOSE[torch.bfloat16])


@pytest.mark.parametrize("shape", [(0, 6, 5, 3), (4, 6, 0, 3), (0, 6, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer", [nk.BatchNorm(6), nk.GroupNorm(6, num_groups=3), nk.InstanceNorm(6), nk.LayerNorm(6),
              nk.PositionalNorm(6)], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_nothing_in_gives_nothing_and_zero_gradients(layer, shape, training):
    layer = copy.deepcopy(layer).train(training)
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros(6))


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_buffers_average_all_batches_without_a_momentum(pair):
    theirs, ours = (layer.double() for layer in pair.make(momentum=None))
    for layer in (theirs, ours):
        layer.reset_running_stats()
    for seed in range(4):
        x = values(pair.shape, seed=seed)
        theirs(x)
        ours(x)
    for name in ("running_mean", "running_var"):
        assert_close(ours.get_buffer(name), theirs.get_buffer(name), atol=1e-14, rtol=1e-14)
    means = [values(pair.shape, seed=seed).transpose(0, 1).flatten(1).mean(1) for seed in range(4)]
    assert_close(ours.running_mean, sum(means) / 4, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_the_momentum_may_change_on_the_way(pair):
    theirs, ours = pair.make()
    for momentum in (0.5, None, 0.0, 1.0):
        for layer in (theirs, ours):
            layer.momentum = momentum
            layer(values(pair.shape, torch.float32))
        for name, buffer in theirs.named_buffers():
            assert_close(ours.get_buffer(name), buffer, **CLOSE[torch.float32])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_what_is_not_finite_reaches_as_far_as_in_torch(pair, training, bad):
    theirs, ours = (layer.train(training) for layer in pair.make())
    x, grad = values(pair.shape, torch.float32), values(pair.shape, torch.float32, seed=1)
    x.flatten()[3] = bad
    (y, found), (expected, wanted) = gradients(ours, x, grad), gradients(theirs, x, grad)
    for one, other in zip((y, *found), (expected, *wanted), strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
        assert_close(one.nan_to_num(), other.nan_to_num(), **CLOSE[torch.float32])
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name).isfinite(), buffer.isfinite())


@pytest.mark.parametrize("wants", ["x", "weight", "bias", ""])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_gradients_of_only_some(pair, training, wants):
    theirs, ours = (layer.train(training) for layer in pair.make())
    found = []
    for layer in (theirs, ours):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == wants)
        x = values(pair.shape, torch.float32).requires_grad_(wants == "x")
        y = layer(x)
        assert y.requires_grad == bool(wants)
        if wants:
            y.backward(values(pair.shape, torch.float32, seed=1))
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, **CLOSE[torch.float32])


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_inference_mode(pair):
    theirs, ours = (layer.eval() for layer in pair.make())
    with torch.inference_mode():
        x = values(pair.shape, torch.float32)
        y = ours(x)
        assert y.is_inference()
        assert_close(y, theirs(x), **CLOSE[torch.float32])
        ours.train()(x)
    theirs.train()(x.clone())
    for name, buffer in theirs.named_buffers():
        assert_close(ours.get_buffer(name), buffer, **CLOSE[torch.float32])


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_an_input_changed_before_backward_is_noticed(pair):
    for layer in pair.make():
        base = values(pair.shape, torch.float32).requires_grad_()
        x = base * 1
        y = layer(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_a_result_changed_before_backward_is_not_needed(pair, training):
    results = []
    for layer in (layer.train(training) for layer in pair.make()):
        x = values(pair.shape, torch.float32).requires_grad_()
        y = layer(x)
        y.mul_(2)
        y[0].zero_()
        results.append(torch.autograd.grad(y.pow(2).sum(), (x, *layer.parameters())))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_a_view_as_the_input(pair):
    theirs, ours = pair.make()
    x = values((pair.shape[0] + 2, *pair.shape[1:]), torch.float32)[1:-1]
    before = x.clone()
    assert_close(ours(x), theirs(x), **CLOSE[torch.float32])
    assert torch.equal(x, before)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_two_calls_before_one_backward(pair):
    results = []
    for layer in pair.make():
        inputs = [values(pair.shape, torch.float32, seed).requires_grad_() for seed in range(2)]
        sum(layer(x).pow(2).sum() for x in inputs).backward()
        results.append([t.grad for t in (*inputs, *layer.parameters())])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)
