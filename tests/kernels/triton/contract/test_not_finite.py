"""Values far from each other, or not finite, on the Triton kernels."""

import pytest
import torch
from torch.testing import assert_close

import oracle
from cases import EVERY, groups, randn, statistics
from values import buffers_of, in_float64

# the interpreter computes in numpy, which warns where a GPU gives NaN
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
CASES = {case.name: case for case in EVERY}
SHAPE = (3, 6, 3, 3)
TRACKED = ("bn", "gbgn-whole", "gn-tracked", "ln-tracked", "gnplus-parallel", "bcn", "sn", "ibn")
COMPOSITES = ("gnplus", "gnplus-parallel", "bcn", "sn", "ibn")


def spoiled(value, device):
    x = randn(*SHAPE, dtype=torch.float32)
    x[1, 4].view(-1)[2] = value
    return x.to(device)


def on_cpu(tensors):
    return [t.cpu() for t in tensors]


@pytest.mark.parametrize("name", TRACKED)
def test_channels_far_from_each_other_keep_their_digits(name, device):
    case = CASES[name]
    layer = case.make().to(device)
    offsets = torch.tensor([0.0, 1000.0, -1000.0, 500.0, 30.0, -2.0]).view(1, 6, 1, 1)
    x = (randn(*SHAPE) * 0.1 + offsets).float()
    statistics(layer).running_var.zero_()
    before = on_cpu(buffers_of(case, layer))
    layer(x.to(device))
    parameters = {name: p.cpu() for name, p in in_float64(layer).items()}
    wanted = oracle.follow(case.kind, x.double(), before, parameters, layer.eps, **groups(case))
    found = on_cpu(buffers_of(case, layer))
    assert_close(found[0], wanted[0], rtol=2e-6, atol=1e-5)
    assert_close(found[1] / wanted[1], torch.ones_like(wanted[1]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", ["tile", "stream"], indirect=True)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["bn", "gn-tracked", "gbgn-whole"])
def test_a_first_value_far_from_the_others_costs_no_digits(name, layout, path, device):
    case = CASES[name]
    layer = case.make().to(device)
    statistics(layer).running_var.zero_()
    before = on_cpu(buffers_of(case, layer))
    x = (randn(3, 6, 5, 7) + 1e4).float()
    x[0, :, 0, 0] = 1e6
    x = x.contiguous(memory_format=layout)
    layer(x.to(device))
    parameters = {name: p.cpu() for name, p in in_float64(layer).items()}
    wanted = oracle.follow(case.kind, x.double(), before, parameters, layer.eps, **groups(case))
    found = on_cpu(buffers_of(case, layer))
    away = (found[0] - wanted[0]) / wanted[1].sqrt()
    assert_close(away, torch.zeros_like(away), rtol=0, atol=5e-6)
    assert_close(found[1] / wanted[1], torch.ones_like(wanted[1]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["bn", "gn-tracked", "gbgn-whole", "ibn", "bcn"])
def test_a_nan_stays_in_its_channel(name, device):
    case = CASES[name]
    layer = case.make().to(device)
    before = on_cpu(buffers_of(case, layer))
    x = spoiled(float("nan"), device)
    y = layer(x)
    parameters = {name: p.cpu() for name, p in in_float64(layer).items()}
    exact = x.cpu().double()
    options = groups(case)
    wanted = oracle.train(case.kind, exact, parameters, layer.eps, before, **options)
    assert torch.equal(y.isfinite().cpu(), wanted.isfinite())
    moved = oracle.follow(case.kind, exact, before, parameters, layer.eps, **options)
    for ours, theirs in zip(on_cpu(buffers_of(case, layer)), moved, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("name", ["bn", "bgn", "ibn"])
def test_an_infinite_value_at_evaluation_stays_where_it_is(name, device):
    layer = CASES[name].make().to(device).eval()
    clean, dirty = randn(*SHAPE, dtype=torch.float32).to(device), spoiled(float("inf"), device)
    found = []
    for x in (clean, dirty):
        x.requires_grad_()
        y = layer(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        found.append((y.detach()[:, 3:], grad[:, 3:]))  # without ibn's instance norm
    elsewhere = dirty.isfinite()[:, 3:]
    assert_close(found[1][0][elsewhere], found[0][0][elsewhere], rtol=1e-6, atol=1e-6)
    assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COMPOSITES)
def test_an_example_weight_of_one_ignores_the_running_statistics(name, device):
    layer = CASES[name].make().to(device).eval()
    layer.example_weight = 1
    found = []
    for value in (0.0, float("nan")):
        statistics(layer).running_mean.fill_(value)
        statistics(layer).running_var.fill_(1 + value)
        x = randn(*SHAPE, dtype=torch.float32).to(device).requires_grad_()
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bn", "gnplus", "gnplus-parallel", "ibn"])
def test_the_gradient_at_evaluation_does_not_read_the_running_mean(name, device):
    layer = CASES[name].make().to(device).eval()
    layer.example_weight = 0
    found = []
    for value in (0.0, float("nan")):
        statistics(layer).running_mean[-1] = value
        x = randn(*SHAPE, dtype=torch.float32).to(device).requires_grad_()
        y = layer(x)
        assert y.isfinite().all(dim=(0, 2, 3)).tolist() == [True] * 5 + [value == 0]
        found.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
