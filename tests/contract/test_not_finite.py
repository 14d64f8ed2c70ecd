"""One value that is not finite affects exactly the results that depend on it by definition."""

import pytest
import torch
from torch.testing import assert_close

import oracle
from cases import EVERY, TOLERANCE, groups, randn, statistics
from values import arrange, buffers_of, gradients, in_float64

pytestmark = pytest.mark.usefixtures("kernels")
SHAPE = (4, 6, 5, 3)
TRACKED = [case for case in EVERY if case.tracks]


def spoiled(shape, value, dtype=torch.float32, layout="contiguous"):
    """Normal values, one of them not finite, in the last channel but one of the second example."""
    x = randn(*shape, dtype=dtype)
    x[1, 4].view(-1)[2] = value
    return arrange(x, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_training_keeps_the_other_groups_finite(case, value, layout):
    layer = case.make()
    x = spoiled(SHAPE, value, layout=layout)
    y, parameters = layer(x), in_float64(layer)
    buffers = (torch.zeros(6), torch.ones(6)) if case.kind == "bcn-micro" else None
    wanted = oracle.train(case.kind, x.double(), parameters, layer.eps, buffers, **groups(case))
    assert torch.equal(y.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_buffers_of_the_other_channels_stay_finite(case, layout):
    layer = case.make()
    before, x = buffers_of(case, layer), spoiled(SHAPE, float("nan"), layout=layout)
    wanted = oracle.follow(
        case.kind, x.double(), before, in_float64(layer), layer.eps, **groups(case)
    )
    layer(x)
    for ours, theirs in zip(buffers_of(case, layer), wanted, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert not ours.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_evaluation_keeps_the_other_values_finite(case, alpha, value, layout):
    layer = case.make(dtype=torch.float64)
    layer(randn(*SHAPE))
    layer.eval().example_weight = alpha
    x = spoiled(SHAPE, value, torch.float64, layout)
    y = layer(x)
    wanted = oracle.evaluate(
        case.kind, x, in_float64(layer), layer.eps, buffers_of(case, layer), alpha, **groups(case)
    )
    assert torch.equal(y.isfinite(), wanted.isfinite())
    finite = wanted.isfinite()
    assert_close(y[finite], wanted[finite].detach(), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [SHAPE, (4, 6, 20, 20), (40, 6), (4, 6, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", ["bn", "ghost", "gbgn", "bgn", "ibn"])
def test_the_gradient_at_evaluation_does_not_read_the_input(kind, shape, layout):
    case = next(c for c in EVERY if c.kind == kind)
    layer = case.make(dtype=torch.float64)
    layer(randn(40, 6, 3) if len(shape) == 2 else randn(4, 6, 3, 4))
    layer.eval()
    clean = randn(*shape, seed=1)
    grad = randn(*shape, seed=2)
    dirty = clean.clone()
    dirty[1, 4].view(-1)[-1] = float("inf")
    found = []
    for values in (clean, dirty):
        x = arrange(values, layout).requires_grad_()
        found.append(gradients(layer(x), x, layer, grad)[0])
    rows = slice(3, None) if kind == "ibn" else slice(None)  # its first half is an instance norm
    assert_close(found[1][:, rows], found[0][:, rows], atol=0, rtol=0)
    assert found[1][:, rows].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_a_running_mean_that_is_not_finite_reaches_what_it_reaches(case, alpha, bad, layout):
    layer = case.make(dtype=torch.float64)
    layer(randn(*SHAPE))
    layer.eval().example_weight = alpha
    statistics(layer).running_mean[-1] = bad
    x, grad = randn(*SHAPE, seed=1).requires_grad_(), randn(*SHAPE, seed=2)
    wanted = oracle.evaluate(
        case.kind, x, in_float64(layer), layer.eps, buffers_of(case, layer), alpha, **groups(case)
    )
    (expected,) = torch.autograd.grad(wanted, x, grad)
    arranged = arrange(x.detach(), layout).requires_grad_()
    y = layer(arranged)
    found = gradients(y, arranged, layer, grad)[0]
    for ours, theirs in ((y.detach(), wanted.detach()), (found, expected)):
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        assert_close(ours[finite], theirs[finite], **TOLERANCE[torch.float64])


@pytest.mark.parametrize("mean", [1e8, float("nan")], ids=str)
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_an_example_weight_of_one_ignores_the_running_statistics(case, mean):
    layer = case.make(dtype=torch.float32).eval()
    layer.example_weight = 1
    x = randn(*SHAPE, dtype=torch.float32).requires_grad_()
    grad = randn(*SHAPE, seed=1, dtype=torch.float32)
    statistics(layer).running_mean.fill_(mean)
    y = layer(x)
    x64, parameters = x.detach().double().requires_grad_(), in_float64(layer)
    zeros = (torch.zeros(54), torch.ones(54))
    running = tuple(t[: statistics(layer).running_mean.numel()] for t in zeros)
    wanted = oracle.evaluate(case.kind, x64, parameters, layer.eps, running, 1.0, **groups(case))
    assert_close(y.double(), wanted.detach(), atol=2e-5, rtol=2e-5)
    found = gradients(y, x, layer, grad)
    expected = torch.autograd.grad(wanted, [x64, *parameters.values()], grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        assert_close(ours.double(), theirs, atol=1e-4 * scale, rtol=1e-4)
