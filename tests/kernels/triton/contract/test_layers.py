"""Layers on the Triton kernels: values, gradients and buffers against the float64 oracle."""

import itertools
import os

import pytest
import torch
from torch.testing import assert_close

import normkit as nk
import oracle
from cases import EVERY, SHAPES, TOLERANCE, groups, randn, statistics
from formulas import FORMULAS, results

THOROUGH = os.environ.get("TRITON_INTERPRET") != "1" and "NORMKIT_CONTRACT" not in os.environ
CASES = {case.name: case for case in EVERY if case.kind != "gw"}
PATHS = ("tile", "stream")
float32 = torch.float32

PICKED = [  # one that each of the ways through the kernels needs
    ("bn", "odd", float32, "contiguous", "tile"),
    ("bn", "one", float32, "contiguous", "stream"),
    ("bn", "odd", torch.bfloat16, "channels_last", "tile"),
    ("bn", "line", torch.bfloat16, "channels_last", "stream"),
    ("bn", "dense", torch.float16, "contiguous", "tile"),
    ("bn", "dense", float32, "contiguous", "stream"),
    ("bn", "pixel", float32, "sliced", "tile"),
    ("bn", "line", torch.float64, "contiguous", "tile"),
    ("bn", "line", torch.float64, "sliced", "stream"),
    ("in", "line", float32, "contiguous", "tile"),
    ("in", "one", float32, "contiguous", "stream"),
    ("ln", "one", torch.float16, "contiguous", "stream"),
    ("ln", "dense", float32, "contiguous", "tile"),
    ("gn", "odd", float32, "contiguous", "tile"),
    ("gn", "line", float32, "channels_last", "stream"),
    ("gn", "volume", torch.float64, "channels_last", "tile"),
    ("gn", "one", torch.bfloat16, "contiguous", "stream"),
    ("pn", "odd", float32, "contiguous", "tile"),
    ("pn", "dense", torch.float64, "contiguous", "tile"),
    ("pn", "line", torch.bfloat16, "channels_last", "tile"),
    ("bgn", "odd", float32, "channels_last", "tile"),
    ("bgn", "line", float32, "contiguous", "stream"),
    ("bgn-cuts", "line", float32, "contiguous", "tile"),
    ("bgn-cuts", "line", float32, "channels_last", "stream"),
    ("ghost", "odd", float32, "channels_last", "tile"),
    ("ghost-rest", "pixel", float32, "contiguous", "tile"),
    ("ghost-rest", "pixel", float32, "contiguous", "stream"),
    ("gbgn", "line", float32, "contiguous", "tile"),
    ("gbgn", "dense", torch.float64, "contiguous", "stream"),
    ("gn-tracked", "line", float32, "contiguous", "tile"),
    ("gbgn-whole", "line", float32, "contiguous", "stream"),
    ("bcn", "line", float32, "contiguous", "stream"),
    ("bcn-micro", "odd", float32, "channels_last", "tile"),
    ("bcn-micro", "one", torch.float64, "contiguous", "stream"),
    ("gnplus", "line", float32, "contiguous", "tile"),
    ("gnplus", "one", float32, "contiguous", "stream"),
    ("gnplus-batch", "line", float32, "channels_last", "tile"),
    ("gnplus-parallel", "line", torch.float64, "contiguous", "tile"),
    ("bcn-channel", "line", torch.float16, "contiguous", "tile"),
    ("sn", "line", torch.bfloat16, "contiguous", "tile"),
    ("sn-two", "line", float32, "contiguous", "tile"),
    ("ibn", "line", float32, "contiguous", "tile"),
    ("ibn", "one", torch.float64, "channels_last", "stream"),
]  # fmt: skip


def rows():
    """What is picked; on a GPU everything."""
    if not THOROUGH:
        return PICKED
    found = []
    for case in CASES.values():
        layouts = ("contiguous", "channels_last", "sliced")
        found += itertools.product([case.name], case.shapes, TOLERANCE, layouts, PATHS)
    return found


def arrange(x, layout):
    """Lay the same values out differently in memory."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    return x.contiguous()


def on(device, case, dtype):
    """The case's layer on a device."""
    return case.make(dtype=wide(dtype)).to(device)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_float64(layer):
    """Parameters by name, on the CPU, as leaves of their own."""
    return {n: p.detach().cpu().double().requires_grad_() for n, p in layer.named_parameters()}


def buffers_of(case, layer):
    if not case.tracks:
        return None
    holder = statistics(layer)
    return [t.detach().cpu().double().clone() for t in (holder.running_mean, holder.running_var)]


def near(found, expected, dtype, times=1):
    """Let an error be small beside the largest value: sums over a map grow with it."""
    tolerance = TOLERANCE[dtype]
    largest = max(1.0, expected.abs().max().item())
    assert_close(
        found.detach().cpu().double(),
        expected.detach(),
        atol=times * tolerance["atol"] * largest,
        rtol=tolerance["rtol"],
    )


@pytest.mark.parametrize(("name", "shape", "dtype", "layout", "path"), rows(), indirect=["path"])
def test_training_matches_its_definition(name, shape, dtype, layout, path, device):
    case, shape = CASES[name], SHAPES[shape]
    layer = on(device, case, dtype)
    x = arrange(randn(*shape, dtype=dtype, mean=0.5).to(device), layout).requires_grad_()
    grad = randn(*shape, dtype=dtype, seed=1)
    before = buffers_of(case, layer)
    assert nk.explain(layer, x).kernels == "triton"
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], grad.to(device))
    exact, parameters = x.detach().cpu().double().requires_grad_(), in_float64(layer)
    value = oracle.train(case.kind, exact, parameters, layer.eps, before, **groups(case))
    expected = torch.autograd.grad(value, [exact, *parameters.values()], grad.double())
    assert y.dtype == dtype
    assert y.stride() == torch.empty_like(x).stride()
    near(y, value, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs, dtype)
    if case.tracks:
        options = groups(case)
        moved = oracle.follow(case.kind, exact.detach(), before, parameters, layer.eps, **options)
        for ours, theirs in zip(buffers_of(case, layer), moved, strict=True):
            near(ours, theirs, wide(dtype))
        assert statistics(layer).num_batches_tracked == 1


EVALUATED = [  # of several examples where these are weighed by kernels of their own
    ("bn", 0.0, "one", "contiguous", "stream"),
    ("bgn-cuts", 0.0, "one", "contiguous", "stream"),
    ("ghost", 1.0, "one", "contiguous", "stream"),
    ("bgn-weighed", 0.3, "one", "contiguous", "stream"),
    ("bcn", 0.0, "one", "contiguous", "stream"),
    ("bcn", 0.3, "line", "contiguous", "tile"),
    ("gnplus", 0.0, "line", "contiguous", "tile"),
    ("gnplus", 0.3, "line", "contiguous", "tile"),
    ("gnplus-batch", 0.3, "line", "contiguous", "tile"),
    ("gnplus-parallel", 0.3, "line", "contiguous", "tile"),
    ("sn", 0.0, "line", "contiguous", "tile"),
    ("sn", 0.3, "line", "channels_last", "tile"),
    ("ibn", 0.0, "line", "contiguous", "tile"),
    ("ibn", 0.3, "line", "channels_last", "tile"),
]


def evaluated():
    """What is picked; on a GPU both ways through the kernels and two layouts."""
    if not THOROUGH:
        return EVALUATED
    picked = [(name, alpha, "line") for name, alpha, *_ in EVALUATED]
    ways = list(itertools.product(("contiguous", "channels_last"), PATHS))
    return [(*one, *way) for one, way in itertools.product(picked, ways)]


@pytest.mark.parametrize(
    ("name", "alpha", "shape", "layout", "path"), evaluated(), indirect=["path"]
)
def test_evaluation_matches_its_definition(name, alpha, shape, layout, path, device):
    case, shape, dtype = CASES[name], SHAPES[shape], torch.float32
    layer = on(device, case, dtype)
    with nk.use_kernels("reference"):
        layer(randn(*shape, dtype=dtype, mean=0.5).to(device))
    layer.eval().example_weight = alpha
    x = arrange(randn(*shape, dtype=dtype, mean=1.0, seed=5).to(device), layout).requires_grad_()
    running = buffers_of(case, layer)
    y = layer(x)
    statistics(layer).running_mean.fill_(3.0)  # what a forward knew, backward still knows
    statistics(layer).running_var.fill_(5.0)
    grad = randn(*shape, dtype=dtype, seed=6)
    found = torch.autograd.grad(y, [x, *layer.parameters()], grad.to(device))
    exact, parameters = x.detach().cpu().double().requires_grad_(), in_float64(layer)
    value = oracle.evaluate(case.kind, exact, parameters, layer.eps, running, alpha, **groups(case))
    near(y, value, dtype)
    expected = torch.autograd.grad(value, [exact, *parameters.values()], grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs, dtype, times=8)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("name", list(CASES) if THOROUGH else ["bn", "gn", "bgn-cuts", "bcn", "pn"])
def test_an_offset_costs_no_digits(name, path, device):
    case, shape = CASES[name], SHAPES["line" if THOROUGH else "one"]
    layer = on(device, case, torch.float32)
    x = randn(*shape, mean=1e4, dtype=torch.float32).to(device).requires_grad_()
    grad = randn(*shape, seed=1, dtype=torch.float32)
    before = buffers_of(case, layer)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], grad.to(device))
    exact, parameters = x.detach().cpu().double().requires_grad_(), in_float64(layer)
    value = oracle.train(case.kind, exact, parameters, layer.eps, before, **groups(case))
    near(y, value, torch.float32)
    expected = torch.autograd.grad(value, [exact, *parameters.values()], grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, theirs, torch.float32)


@pytest.mark.addresses
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_64_bit_addresses_reach_the_same_elements(path, device, monkeypatch):
    from normkit.kernels.triton import geometry  # not without triton

    x = arrange(randn(2, 6, 9, dtype=torch.float32).to(device), "channels_last")
    results = []
    for largest in (geometry.LARGEST_INT32, 0):
        monkeypatch.setattr(geometry, "LARGEST_INT32", largest)
        assert geometry.Map.of(x).is_wide == (largest == 0)
        layer = on(device, CASES["bgn-cuts"], torch.float32)
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    for narrow, wide_ones in zip(*results, strict=True):
        assert torch.equal(narrow, wide_ones)


@pytest.mark.addresses
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_elements_beyond_32_bits_are_reached(path, device):
    memory = torch.empty(2**31 + 18, dtype=torch.bfloat16, device=device)  # touched in three places
    x = memory.as_strided((3, 6, 3), (2**30, 3, 1))
    x.copy_(randn(3, 6, 3, dtype=torch.bfloat16))
    same_as_contiguous(x, on(device, CASES["bn"], torch.float32))


@pytest.mark.addresses
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_segments_may_begin_at_any_address(path, device):
    x = randn(1, 6, 17, dtype=torch.float32).to(device)[..., :16]
    same_as_contiguous(x, on(device, CASES["in"], torch.float32))
    # contiguous channels of a group are read as one run, which rounds in another order
    for found, expected in zip(*both_ways(x, on(device, CASES["gn"], torch.float32)), strict=True):
        assert_close(found, expected, atol=1e-6, rtol=1e-5)


def same_as_contiguous(x, layer):
    """Where the elements lie changes nothing, not a bit."""
    for far, near_by in zip(*both_ways(x, layer), strict=True):
        assert torch.equal(far, near_by)


def both_ways(x, layer):
    """Result and gradients for a map as it lies, and for the same map in one piece."""
    results = []
    for given in (x, x.contiguous()):
        leaf = given.detach().requires_grad_()
        y = layer(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    return results


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_the_same_call_gives_the_same_bits(path, device):
    shape = (33, 48, 31, 29) if THOROUGH else SHAPES["one"]
    x = randn(*shape, dtype=torch.float32).to(device).requires_grad_()
    layer = nk.GroupNorm(shape[1], num_groups=3).to(device)
    found = []
    for _ in range(5 if THOROUGH else 2):
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


def test_an_empty_batch_gives_zero_gradients(device):
    layer = nk.BatchNorm(6).to(device)
    x = torch.randn(0, 6, 4, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(6, device=device))


def test_without_affine_and_momentum(device):
    x = randn(4, 6, 5, dtype=torch.float32).to(device).requires_grad_()
    results = []
    for kernels in ("reference", "triton"):
        layer = nk.BatchNorm(6, affine=False, momentum=None).to(device)
        with nk.use_kernels(kernels):
            y = layer(layer(x))
        results.append([y, *torch.autograd.grad(y.square().sum(), x), *layer.buffers()])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spec", ["bn", "gn:2", "pn", "ghost:2", "bcn:2:micro", "gnplus:2"])
def test_a_plan_is_carried_out_on_the_values_of_each_call(spec, offset, device):
    layers = [nk.build(spec, 6).to(device) for _ in range(2)]
    for step in range(3):
        memory = randn(4 * 6 * 5 + offset, seed=step, dtype=torch.float32).to(device)
        x = memory[offset:].view(4, 6, 5)  # at one step's address or another's
        results = []
        for kernels, layer in zip(("reference", "triton"), layers, strict=True):
            leaf = x.detach().requires_grad_()
            with torch.no_grad():
                for p in layer.parameters():
                    p.copy_(p + 0.1 * step)
            with nk.use_kernels(kernels):
                y = layer(leaf)
            grads = torch.autograd.grad((y * y * y).sum(), (leaf, *layer.parameters()))
            results.append([y, *grads, *layer.buffers()])
        for one, other in zip(*results, strict=True):
            assert_close(one, other, atol=2e-5, rtol=2e-5)


COMPOSITES = ["bcn", "bcn-micro", "gnplus", "ibn", "sn"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_take_three_launches_each_way(name, training, device, monkeypatch):
    from normkit.kernels.triton import composite, passes, plan  # needs triton

    monkeypatch.setattr(plan, "_PLANS", {})
    seen = []
    launch = passes.launch

    def note(kernel, *arguments, **options):
        seen.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(composite, "launch", note)
    monkeypatch.setattr(passes, "launch", note)
    x = randn(2, 6, 4, dtype=torch.float32).to(device).requires_grad_()
    y = on(device, CASES[name], torch.float32).train(training)(x)
    forward = list(seen)
    torch.autograd.grad(y.square().sum(), x)
    assert forward == ["moments", "tables", "apply"]
    assert seen[3:] == ["reduce_grad", "tables", "combine_grad"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_that_no_layer_has(name, training, device):
    x, grad = randn(5, 12, 6, mean=1.0), randn(5, 12, 6, seed=1)
    if device.type != "cpu":
        pytest.skip("these formulas' parameters are on the CPU")
    expected, found = (
        results(name, x, grad, kernels, training) for kernels in ("reference", "triton")
    )
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", COMPOSITES)
def test_groups_too_wide_for_one_launch_give_the_same(name, device, monkeypatch):
    from normkit.kernels.triton import composite, plan  # needs triton

    x = randn(5, 6, 4, dtype=torch.float64).to(device).requires_grad_()

    def results():
        layer = on(device, CASES[name], torch.float64)
        y = layer(x)
        return [y, *torch.autograd.grad(y.pow(3).sum(), (x, *layer.parameters()))]

    with nk.use_kernels("triton"):
        expected = results()
        monkeypatch.setattr(composite, "COLUMNS", 1)
        monkeypatch.setattr(composite, "MOST_CELLS", 1)
        monkeypatch.setattr(plan, "_PLANS", {})
        found = results()
    assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["pn", "bcn"])
def test_an_activation_and_a_residual_come_after_the_kernels(name, training, device):
    plain = CASES[name].make().to(device).train(training)
    ending = CASES[name].make(activation="silu").to(device).train(training)
    x, residual = (
        randn(3, 6, 5, seed=s, dtype=float32).to(device).requires_grad_() for s in (0, 1)
    )
    y, expected = ending(x, residual=residual), plain(x) + residual
    expected = expected * torch.sigmoid(expected)
    assert_close(y, expected)
    grad = randn(3, 6, 5, seed=2, dtype=float32).to(device)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, residual), grad),
        torch.autograd.grad(expected, (x, residual), grad),
        strict=True,
    ):
        assert_close(ours, theirs)
