"""``act(norm(x) + residual)`` by the Triton kernels, against the float64 oracle."""

import itertools
import os
import random

import pytest
import torch

import normkit as nk
import oracle
from cases import CASES, COMPOSITES, SHAPES, groups, randn, statistics
from kernels.triton.contract.test_layers import (
    arrange,
    buffers_of,
    in_float64,
    near,
    on,
)

THOROUGH = os.environ.get("TRITON_INTERPRET") != "1" and "NORMKIT_CONTRACT" not in os.environ
NAMED = {case.name: case for case in CASES}
SINGLE = {case.name: case for case in CASES if case.kind != "pn"}
MIXED = {c.name: c for c in COMPOSITES if c.kind != "gw"}
POSITIONAL = {"pn": NAMED["pn"]}
EVERY = SINGLE | MIXED | POSITIONAL
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "hardswish", "sigmoid", "tanh", "relu6")
LAYOUTS = ("contiguous", "channels_last", "sliced")


def rows():
    """Every activation with and without a residual on both ways; the rest is drawn."""
    pick = random.Random(0)
    found = []
    kinds = SINGLE, MIXED, POSITIONAL
    ways = itertools.product(kinds, (*ACTIVATIONS, None), (False, True), ("tile", "stream"))
    for kind, activation, has_residual, path in ways:
        if (activation is None and not has_residual) or (kind is not SINGLE and path == "tile"):
            continue  # composites and positions have one way
        for _ in range(20 if THOROUGH else 1):
            name = pick.choice(list(kind))
            case = EVERY[name]
            small = [s for s in case.shapes if THOROUGH or s in ("line", "one", "dense", "pixel")]
            layouts = tuple(pick.choice(LAYOUTS) for _ in range(3))
            dtype = pick.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
            mode = pick.choice(("train", "train", "eval")) if case.tracks else "train"
            found.append(
                (name, pick.choice(small), dtype, layouts, activation, has_residual, mode, path)
            )
    return found


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "layouts", "activation", "has_residual", "mode", "path"),
    rows(), indirect=["path"],
)  # fmt: skip
def test_values_and_gradients_match_the_definition(
    name, shape, dtype, layouts, activation, has_residual, mode, path, device
):
    case, shape = EVERY[name], SHAPES[shape]
    layer = on(device, case, dtype)
    layer.activation, layer.negative_slope = activation, 0.2
    if mode == "eval":
        with nk.use_kernels("reference"):
            layer(randn(*shape, dtype=torch.float32, mean=0.5).to(dtype).to(device))
        layer.eval().example_weight = 0.0
    x, residual, grad = (
        arrange(randn(*shape, dtype=dtype, mean=m, seed=s).to(device), layout)
        for m, s, layout in zip((0.5, 0, 0), range(3), layouts, strict=True)
    )
    x.requires_grad_()
    residual.requires_grad_()
    before = buffers_of(case, layer)
    y = layer(x, residual=residual) if has_residual else layer(x)
    inputs = [x, *layer.parameters(), *([residual] if has_residual else [])]
    found = torch.autograd.grad(y, inputs, grad)
    assert y.dtype == dtype

    x64, residual64 = (t.detach().cpu().double().requires_grad_() for t in (x, residual))
    parameters = in_float64(layer)
    if mode == "eval":
        u = oracle.evaluate(case.kind, x64, parameters, layer.eps, before, 0.0, **groups(case))
    else:
        u = oracle.train(case.kind, x64, parameters, layer.eps, before, **groups(case))
    value = oracle.ended(u, activation, 0.2, residual64 if has_residual else None)
    wanted = [x64, *parameters.values(), *([residual64] if has_residual else [])]
    expected = torch.autograd.grad(value, wanted, grad.cpu().double())
    for ours, theirs in zip((y, *found), (value, *expected), strict=True):
        near(ours, theirs, dtype, times=8 if mode == "eval" else 1)


@pytest.mark.parametrize("path", ["tile", "stream"], indirect=True)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_an_offset_costs_no_digits_of_the_activations_gradient(activation, path, device):
    layer = on(device, SINGLE["bn"], torch.float32)
    layer.activation = activation
    shape = SHAPES["one"]
    x = randn(*shape, mean=1e4, dtype=torch.float32).to(device).requires_grad_()
    grad = randn(*shape, seed=1, dtype=torch.float32)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, grad.to(device))
    x64, parameters = x.detach().cpu().double().requires_grad_(), in_float64(layer)
    value = oracle.ended(oracle.train("bn", x64, parameters, layer.eps, None), activation, 0.0)
    near(y, value, torch.float32)
    near(dx, torch.autograd.grad(value, x64, grad.double())[0], torch.float32)


@pytest.mark.parametrize("path", ["tile", "stream"], indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_far_out_too(activation, path, device):
    values = torch.cat((torch.linspace(-12, 12, 601), torch.tensor([-120.0, -89.0, 89.0, 120.0])))
    layer = nk.BatchNorm(1, eps=0.0, affine=False, activation=activation, dtype=torch.float64)
    layer = layer.to(device).eval()
    x = values.double().reshape(1, 1, -1).to(device).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    x64 = x.detach().cpu().requires_grad_()
    value = oracle.ended(x64, activation, 0.01)
    (expected,) = torch.autograd.grad(value, x64, torch.ones_like(value))
    inside = ((x64.detach().abs() - 3).abs() > 1e-3) & ((x64.detach() - 6).abs() > 1e-3)  # corners
    torch.testing.assert_close(y.detach().cpu(), value.detach(), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(dx.cpu()[inside], expected[inside], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("path", ["tile", "stream"], indirect=True)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["bn", "bcn", "pn"])
def test_only_what_is_wanted_is_computed(name, mode, path, device):
    """The gradient of a residual alone, of a frozen layer, and of neither."""
    layer = on(device, EVERY[name], torch.float64).train(mode == "train").requires_grad_(False)
    layer.activation = "gelu"
    x, residual = (randn(3, 6, 5, seed=s).to(device).requires_grad_() for s in (0, 1))
    both = torch.autograd.grad(layer(x, residual=residual).pow(2).sum(), (x, residual))
    for index, leaf in enumerate((x, residual)):
        inputs = [x.detach(), residual.detach()]
        inputs[index] = leaf
        y = layer(inputs[0], residual=inputs[1])
        (alone,) = torch.autograd.grad(y.pow(2).sum(), leaf)
        torch.testing.assert_close(alone, both[index])
    assert not layer(x.detach(), residual=residual.detach()).requires_grad


def test_buffers_move_as_without_an_ending(device):
    x = randn(4, 6, 5, dtype=torch.float32).to(device)
    plain, ending = (on(device, SINGLE["bn"], torch.float32) for _ in range(2))
    ending.activation = "silu"
    plain(x)
    ending(x, residual=x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        ours, theirs = (getattr(statistics(layer), name) for layer in (ending, plain))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("path", ["tile", "stream"], indirect=True)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", ["bn", "bcn", "pn"])
def test_no_call_takes_more_launches_than_without(name, activation, path, device, monkeypatch):
    from normkit.kernels.triton import composite, passes, pooled, pooled_gradients, positional

    seen = []
    for module in (passes, pooled, pooled_gradients, composite, positional):
        launch = module.launch
        note = lambda kernel, *a, start=launch, **o: (seen.append(kernel), start(kernel, *a, **o))  # noqa: E731
        monkeypatch.setattr(module, "launch", note)
    from normkit.kernels.triton import plan

    counts = []
    for ending in (None, activation):
        monkeypatch.setattr(plan, "_PLANS", {})
        seen.clear()
        layer = on(device, EVERY[name], torch.float32)
        layer.activation = ending
        x, residual = (randn(3, 6, 5, seed=s, dtype=torch.float32) for s in (0, 1))
        x, residual = (t.to(device).requires_grad_() for t in (x, residual))
        y = layer(x, residual=residual) if ending else layer(x)
        torch.autograd.grad(y.sum(), (x, *layer.parameters()))
        counts.append(len(seen))
    assert counts[0] == counts[1] > 1


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", ["bn", "bcn", "gnplus", "sn", "ibn", "pn"])
def test_only_x_and_one_map_that_is_there_anyway_are_kept(name, activation, has_residual, device):
    layer = on(device, {**NAMED, **MIXED}[name], torch.float32)
    layer.activation = activation
    x, residual = (randn(3, 6, 5, 7, seed=s, dtype=torch.float32) for s in (0, 1))
    x, residual = (t.to(device).requires_grad_() for t in (x, residual))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x, residual=residual) if has_residual else layer(x)
    maps = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
    beside = [y if activation == "relu" else residual] if has_residual else []
    assert maps == {t.untyped_storage().data_ptr() for t in (x, *beside)}
