"""What ``torch.compile`` makes of a layer on a GPU, without one: graphs, and what they compute."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from cases import CASES, EVERY, MAIN, TOLERANCE, randn
from kernels.compiling import Graphs, as_on_a_gpu, operators, ours, saved
from normkit.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
SHAPE = (4, 6, 5, 3)
WITHOUT_STATISTICS = {"pn", "gw"}  # a reduction that the compiler makes; products of channels
ON_MAPS = {
    "add", "sub", "mul", "div", "neg", "where", "full", "full_like", "zeros_like", "expand",
    "view", "reshape", "unsqueeze", "squeeze", "permute", "clone", "convert_element_type", "sum",
    "pow", "detach", "alias", "_unsafe_view", "_to_copy", "ones_like", "mean", "var_mean",
}  # fmt: skip
"""What inductor fuses with its neighbours: pointwise operations, views, sums."""


def steps(layer, x):
    """Output, gradients by the input and the parameters, and buffers afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    wanted = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.float().pow(3).sum(), [x, *wanted], allow_unused=True)
    return y, list(found), [b.clone() for b in layer.buffers()]


def compiled_steps(layer, x, **options):
    graphs = Graphs()
    with as_on_a_gpu():
        found = steps(graphs.compile(layer, **options), x)
    return found, graphs


def prepared(case, dtype, training):
    """The layer after a step, and a copy of it."""
    layer = case.make(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    layer(randn(*SHAPE, mean=1.0).to(dtype))
    layer.train(training)
    return layer, copy.deepcopy(layer)


def assert_equal_steps(found, expected, dtype):
    tolerance = TOLERANCE[dtype]
    (y, grads, buffers), (y2, grads2, buffers2) = found, expected
    assert_close(y, y2, **tolerance)
    assert y.stride() == y2.stride()
    for one, other in zip([*grads, *buffers], [*grads2, *buffers2], strict=True):
        if one is not None and one.is_floating_point():
            scale = max(1.0, other.abs().max().item())  # sums of many values of mixed sign
            assert_close(one / scale, other / scale, **tolerance)
        else:
            assert one is None or torch.equal(one, other)


def has_fixed_statistics(case):
    """Whether an evaluation looks at no statistics of the input."""
    return case in CASES and case.tracks and not {"weighed", "tracked"} & set(case.name.split("-"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_graph_computes_what_the_layer_does_by_one_operator(case, training):
    """Also once a call: buffers move, and stay where they are."""
    layer, same = prepared(case, torch.float64, training)
    x = randn(*SHAPE, seed=3).contiguous(memory_format=torch.channels_last)
    places = [b.data_ptr() for b in same.buffers()]
    found, graphs = compiled_steps(same, x)
    assert_equal_steps(found, steps(layer, x), torch.float64)
    assert [b.data_ptr() for b in same.buffers()] == places
    (forward,), (backward,) = graphs.forward, graphs.backward
    without = case.kind in WITHOUT_STATISTICS or (not training and has_fixed_statistics(case))
    assert ours(forward) == ([] if without else ["normkit.moments.default"])
    assert ours(backward) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in MAIN if c.name != "gw"], ids=str)
def test_graphs_of_16_bit_maps_keep_x_and_tables(case, dtype):
    """What is done to something as large as the map is what inductor fuses; no copy is kept."""
    layer, same = prepared(case, dtype, True)
    x = randn(8, 6, 9, 9, mean=1.0, seed=3).to(dtype)
    found, graphs = compiled_steps(same, x)
    assert_equal_steps(found, steps(layer, x), dtype)
    for node in (*graphs.forward[0].nodes, *graphs.backward[0].nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(node.target, torch._ops.OpOverload):
            name = str(node.target).split(".")[1]
            assert value.numel() < x.numel() or name in ON_MAPS, node
    num_moved = sum(1 for _ in same.buffers())
    kept = [t for t in saved(graphs.forward[0], num_moved + 1) if t.numel() >= x.numel()]
    assert [(t.shape, t.dtype) for t in kept] == [(x.shape, x.dtype)]


@pytest.mark.parametrize("name", ["bn", "gn:3", "bcn:3"])
def test_an_activation_and_a_residual_add_no_map_but_the_activations_own(name):
    torch.manual_seed(0)
    norm = nk.build(name, 6)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x, residual):
            return torch.relu(self.norm(x) + residual)

    x = randn(8, 6, 9, 9).float().requires_grad_()
    residual = x.detach().clone().requires_grad_()
    graphs = Graphs()
    with as_on_a_gpu():
        y = graphs.compile(Block())(x, residual)
        found = torch.autograd.grad(y.sum(), [x, residual])
    expected = torch.autograd.grad(torch.relu(norm(x) + residual).sum(), [x, residual])
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **TOLERANCE[torch.float32])
    num_moved = sum(1 for _ in norm.buffers())
    kept = [t for t in saved(graphs.forward[0], num_moved + 1) if t.numel() >= x.numel()]
    assert len(kept) == 2  # x, and where the activation let through


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [c for c in MAIN if c.name != "gw"], ids=str)
def test_an_offset_costs_no_digits(case, training):
    """A mean of 1e4 above a deviation of 1, as far as float32 can hold such a map."""
    layer = case.make().train()
    x = randn(8, 6, 9, 9, mean=1e4).float()
    for _ in range(60):  # running statistics arrive there
        layer(x)
    layer.train(training)
    same = copy.deepcopy(layer)
    found, _ = compiled_steps(same, x)
    (y, grads, buffers), (y2, grads2, buffers2) = found, steps(layer, x)
    assert_close(y, y2, atol=5e-5, rtol=5e-5)
    for one, other in zip([*grads, *buffers], [*grads2, *buffers2], strict=True):
        if one is not None and one.is_floating_point():
            scale = max(1.0, other.abs().max().item())
            assert_close(one / scale, other / scale, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bn", "ghost-rest", "gbgn", "gn", "bcn"])
def test_one_graph_for_every_batch_and_map_size(name):
    (case,) = (c for c in EVERY if c.name == name)
    layer, same = prepared(case, torch.float64, True)
    graphs = Graphs()
    with as_on_a_gpu():
        compiled = graphs.compile(same, dynamic=True)
        shapes = [(8, 6, 5, 3), (13, 6, 7, 9), (18, 6, 4, 4)]
        found = [steps(compiled, randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    for i, shape in enumerate(shapes):
        assert_equal_steps(found[i], steps(layer, randn(*shape, seed=i)), torch.float64)
    has_runs = name in {"ghost-rest", "gbgn"}  # without a rest and with one, or one run and several
    assert len(graphs.forward) == 1 + has_runs


@pytest.mark.parametrize(
    ("name", "momentum"), [("bn", None), ("ghost:5", 0.1), ("bcn:3:micro", 0.1), ("sn", None)]
)
def test_nothing_is_read_on_the_host(name, momentum):
    """A CUDA graph holds kernels only: no value may be read, and no tensor be on the CPU."""
    layer = nk.build(name, 6)
    if "micro" not in name:
        layer.momentum = momentum
    _, graphs = compiled_steps(layer, randn(*SHAPE).float())
    for graph in (*graphs.forward, *graphs.backward):
        names = operators(graph)
        assert not [n for n in names if "_local_scalar" in n or "nonzero" in n]
        assert not [n for n in graph.nodes if n.op == "get_attr"]  # constants live on the CPU


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bn", "gn:3"])
def test_inductor_agrees(name):
    layer = nk.build(name, 6)
    same = copy.deepcopy(layer)
    x = randn(8, 6, 9, 9, mean=3.0).bfloat16()
    torch.compiler.reset()
    with as_on_a_gpu():
        found = steps(torch.compile(same, fullgraph=True), x)
    assert_equal_steps(found, steps(layer, x), torch.bfloat16)


def test_what_is_compiled_for_the_cpu_keeps_its_operators():
    graphs = Graphs()
    steps(graphs.compile(nk.BatchNorm(6)), randn(*SHAPE).float())
    assert operators(graphs.backward[0])[0] == "normkit.pooled_backward.default"
    assert "normkit.pooled_forward.default" in str(graphs.forward[0])


@pytest.mark.parametrize(
    ("name", "kind"), [("bn", ""), ("gn:3", ""), ("pn", "positional_"), ("bcn:3", "composite_")]
)
def test_what_ends_with_a_sum_and_an_activation_is_one_operator_on_the_cpu(name, kind):
    layer = nk.build(f"{name}:activation=silu", 6)
    x, residual = (randn(*SHAPE, seed=s).float().requires_grad_() for s in (0, 1))
    graphs = Graphs()
    y = graphs.compile(lambda x, residual: layer(x, residual=residual))(x, residual)
    torch.autograd.grad(y.sum(), (x, residual))
    (forward,), (backward,) = graphs.forward, graphs.backward
    inside = re.findall(r"normkit\.\w+\.default", str(forward))  # some of an operator of torch
    assert inside == [f"normkit.ended_{kind}forward.default"]
    assert ours(backward) == [f"normkit.ended_{kind}backward.default"]
