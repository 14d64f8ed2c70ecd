"""Triton kernels under compilation, transforms, streams, graphs, and on several devices."""

import copy
import os

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.core.composite import Composite, group_and_batch
from normkit.core.trace import programs_of
from normkit.kernels.operators import NAMESPACE, SCHEMAS

THOROUGH = os.environ.get("TRITON_INTERPRET") != "1"


def draw(*shape, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def test_operators_tell_the_truth_to_tracers(device):
    x, grad = draw(2, 2, 3, device=device), draw(2, 2, 3, device=device, seed=1)
    weight, mean = torch.ones(2, device=device), torch.zeros(2, device=device)
    namespace = getattr(torch.ops, NAMESPACE)
    _, table = namespace.pooled_forward(x, weight, None, 2, 0, 1e-5, True)
    _, positions = namespace.positional_forward(x, weight, None, 1e-5)
    parameters = (weight, None, torch.zeros((), device=device), None)
    formula = Composite(group_and_batch, (1, 1e-4, "group-first"), 1e-5)
    programs = programs_of(formula, 2, (2, None, 1), "own")
    forward, backward = ((text, *parameters, 0.1) for text in programs[:2])
    segments = torch.zeros(2, 2, device=device)
    affine, relu, silu = (weight, mean), (1, 0.0), (3, 0.0)
    _, kept, factors = namespace.ended_composite_forward(x, None, *forward, *silu, None, None)
    calls = {
        "pooled_forward": (x, weight, None, 2, 0, 1e-5, True),
        "pooled_backward": (grad, x, table, weight, 2, 0, 1e-5, True, False),
        "evaluate_forward": (x, mean, weight, weight, None, 2, 1e-5),
        "evaluate_backward": (grad, x, mean, weight, weight, 2, 1e-5, True, True),
        "ended_forward": (x, grad, *affine, 2, 0, 1e-5, True, *relu),
        "ended_backward": (grad, x, table, None, x, *affine, 2, 0, 1e-5, *relu, True, True, False),
        "ended_evaluate_forward": (x, grad, mean, weight, *affine, 2, 1e-5, *silu),
        "ended_evaluate_backward": (
            grad,
            x,
            mean,
            weight,
            grad,
            None,
            *affine,
            2,
            1e-5,
            *silu,
            False,
            True,
            True,
        ),
        "positional_forward": (x, weight, None, 1e-5),
        "positional_backward": (grad, x, positions, weight, 1e-5, True, False),
        "composite_forward": (x, *forward, None, None),
        "composite_backward": (grad, x, kept, *backward, 0b0101),
        "ended_positional_forward": (x, grad, *affine, 1e-5, *silu),
        "ended_positional_backward": (
            grad,
            x,
            positions,
            grad,
            None,
            *affine,
            1e-5,
            *silu,
            True,
            True,
            False,
        ),
        "ended_composite_forward": (x, grad, *forward, *silu, None, None),
        "ended_composite_backward": (
            grad,
            x,
            kept,
            factors,
            grad,
            None,
            *backward,
            *silu,
            True,
            0b0101,
        ),
        "moments": (x, 3),
        "apply": (x, segments, segments, segments),
        "reduce_grad": (grad, x, segments),
        "combine_grad": (grad, x, segments, segments, segments, segments),
    }
    assert calls.keys() == SCHEMAS.keys()
    for name, arguments in calls.items():
        utilities = ("test_schema", "test_faketensor")
        utilities += ("test_aot_dispatch_dynamic",) if THOROUGH else ()
        operator = getattr(namespace, name).default
        torch.library.opcheck(operator, arguments, test_utils=utilities)


def compiled_graphs(layer, x):
    """Output, gradients and buffers of a compiled layer, and the names of what its graphs call."""
    calls = []

    from functorch.compile import make_boxed_func  # slow
    from torch._dynamo.backends.common import aot_autograd

    def note(graph, inputs):
        for node in graph.graph.nodes:  # what may change its inputs is called by way of another
            by_way = "auto_functionalized" in str(node.target)
            calls.append(str(node.args[0] if by_way else node.target))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    y = compiled(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])], calls


@pytest.mark.parametrize(
    ("name", "mode", "operators"),
    [
        ("bn", "train", ["moments"]),
        ("bn", "eval", []),
        ("ghost:2", "train", ["moments"]),
        ("gn:2", "train", ["moments"]),
        ("pn", "train", []),
        ("gnplus:2", "train", ["moments"]),
        ("bcn:2:micro_batch", "train", ["moments"]),
        ("ibn", "eval", ["moments"]),
    ],
)
def test_a_compiled_graph_has_an_operator_for_statistics(name, mode, operators, device):
    x = draw(2, 4, 3, device=device).requires_grad_()
    results = []
    for compiled in (False, True):
        layer = nk.build(name, 4).to(device).train(mode == "train")
        if compiled:
            found, calls = compiled_graphs(layer, x)
        else:
            y = layer(x)
            found = [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
        results.append([*found, *layer.buffers()])
    ours = [name for name in calls if name.startswith("normkit.")]
    assert ours == [f"normkit.{name}.default" for name in operators]
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_transforms_and_second_derivatives_are_the_references(device):
    x, layer = draw(3, 2, 3, device=device), nk.InstanceNorm(2).to(device)
    mapped = torch.func.vmap(layer)(x[None])[0]
    with nk.use_kernels("reference"):
        assert torch.equal(mapped, layer(x))
    leaf = x.double().requires_grad_()
    assert torch.autograd.gradgradcheck(layer.double(), leaf[:1, :1, :2].repeat(1, 2, 1))
    assert nk.explain(layer, leaf).kernels == "triton"


@pytest.mark.parametrize("name", ["bn", "bcn:2", "bcn:2:micro_batch", "pn"])
def test_a_checkpoint_looks_twice_and_moves_buffers_once(name, device):
    x, results = draw(3, 4, 3, device=device), []
    for again in (False, True):
        layer, leaf = nk.build(name, 4).to(device), x.detach().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=False) if again else layer(leaf)
        found = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        results.append([y, *found, *layer.buffers()])
    assert all(map(torch.equal, *results))


def test_buffers_that_a_kernel_moves_count_as_changed(device):
    layer = nk.BatchNorm(2).to(device)
    before = layer.running_mean._version
    layer(draw(2, 2, 3, device=device))
    assert layer.running_mean._version > before


def test_a_graph_that_reads_moved_buffers_is_refused(device):
    layer = nk.BatchNorm(2).to(device)
    scale = torch.ones(2, device=device, requires_grad=True)
    product = scale * layer.running_var  # saves the buffer
    layer(draw(2, 2, 3, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


if THOROUGH:  # not skipped in the interpreter, where there is nothing of the kind: a GPU's alone

    @pytest.mark.parametrize("name", ["bn", "gn:2", "bgn:2", "ghost:2", "bcn:2"])
    def test_nothing_waits_for_the_device(name, device):
        layer, x = nk.build(name, 4).to(device), draw(4, 4, 9, 9, device=device).requires_grad_()
        layer(x).sum().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("name", ["bn", "gn:2", "bgn:2", "ghost:2"])
    def test_a_cuda_graph_replays_a_training_step(name, device):
        layer, x = nk.build(name, 4).to(device), draw(4, 4, 9, 9, device=device).requires_grad_()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.autograd.grad(layer(x).square().sum(), x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x)
        with torch.no_grad():
            x.copy_(draw(4, 4, 9, 9, device=device, seed=3))
        graph.replay()
        fresh = layer(x)
        assert_close(y, fresh)
        assert_close(dx, torch.autograd.grad(fresh.square().sum(), x)[0])

    @pytest.mark.parametrize("name", ["bn", "gn:2", "ghost:2", "bcn:2", "pn"])
    def test_a_compiled_step_is_a_cuda_graph(name, device):
        torch.compiler.reset()
        layer = nk.build(name, 4).to(device)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, mode="reduce-overhead")
        for step in range(5):  # warms up, records, replays
            x = draw(4, 4, 9, 9, device=device, seed=step).requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            y, y2 = layer(x), compiled(x)
            (dx,), (dx2,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, y2))
            assert_close(y2, y, atol=1e-4, rtol=1e-4)
            assert_close(dx2, dx, atol=1e-4, rtol=1e-4)
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        for one, other in zip(layer.buffers(), twin.buffers(), strict=True):
            assert_close(one, other, atol=1e-4, rtol=1e-4)

    def test_the_current_stream_is_used(device):
        layer, stream = nk.BatchNorm(64).to(device), torch.cuda.Stream()
        x = draw(16, 64, 56, 56, device=device)
        expected = layer(x)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            later = x * 2
            y = layer(later)
        stream.synchronize()
        assert_close(y, expected, atol=1e-3, rtol=1e-3)

    def test_a_layer_on_the_cpu_refuses_a_map_on_the_gpu(device):
        x = draw(4, 4, 9, 9, device=device)
        nk.BatchNorm(4).to(device)(x)  # there is a plan for such a map
        with pytest.raises(RuntimeError, match="on one device; these are on cpu, cuda:0"):
            nk.BatchNorm(4)(x)

    def test_autocast_keeps_the_maps_dtype(device):
        layer = nk.GroupNorm(4, num_groups=2).to(device)
        x = draw(4, 4, 9, 9, device=device).bfloat16()
        with torch.autocast("cuda", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
