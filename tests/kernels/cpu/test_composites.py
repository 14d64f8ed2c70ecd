"""The composites' operator: wide and deep tables, every source of statistics, threads, tracers."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

import normkit as nk

LAYERS = {
    "batch then group": lambda c, **k: nk.BatchChannelNorm(c, num_groups=4, **k),
    "groups' own scales": lambda c, **k: nk.BatchChannelNorm(
        c, num_groups=4, channel_affine="channel", **k
    ),
    "estimates": lambda c, **k: nk.BatchChannelNorm(c, num_groups=4, micro_batch=True, **k),
    "group first": lambda c, **k: nk.GroupNormPlus(c, num_groups=4, **k),
    "batch first": lambda c, **k: nk.GroupNormPlus(c, num_groups=4, order="batch-first", **k),
    "parallel": lambda c, **k: nk.GroupNormPlus(c, num_groups=4, order="parallel", **k),
    "switched": nk.SwitchableNorm,
    "switched, two": lambda c, **k: nk.SwitchableNorm(c, use_batch=False, **k),
    "halves": lambda c, **k: nk.InstanceBatchNorm(c, ratio=0.3, **k),
}
SHAPES = {
    "wide": (9, 520, 3, 2),  # more columns than a strip, shorter rows than a vector
    "deep": (300, 8, 5),
    "one example": (1, 8, 6, 7),
    "dense": (6, 24),
    "long rows": (2, 8, 150, 40),
}
NO_SINGLE_VALUES = {"halves", "group first", "batch first", "parallel"}


def build(name, num_features, dtype=torch.float64, **options):
    layer = LAYERS[name](num_features, **options).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(dtype), alpha=0.3)
    return layer


def draw(shape, dtype=torch.float64, mean=2.0):
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (x + mean).to(dtype), grad.to(dtype)


def layout_of(x):
    """Strides of the axes that have more than one element; the others' mean nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def run(layer, x, grad, kernels):
    """Output, every gradient, every buffer."""
    with nk.use_kernels(kernels):
        x = x.detach().requires_grad_()
        y = layer(x)
        found = torch.autograd.grad(y, (x, *layer.parameters()), grad)
    return [y.detach(), *found, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_operator_computes_what_the_algebra_does(name, shape, last):
    if shape == "dense" and name in NO_SINGLE_VALUES:
        shape = "one example"
    x, grad = draw(SHAPES[shape])
    if last and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    for training, weight in ((True, 0.0), (False, 0.0), (False, 0.3), (False, 1.0)):
        layers = [build(name, x.shape[1]) for _ in range(2)]
        for layer, kernels in zip(layers, ("reference", "cpu"), strict=True):
            with nk.use_kernels(kernels):
                layer(x)
            layer.train(training)
        if hasattr(layers[0], "example_weight"):
            for layer in layers:
                layer.example_weight = weight
        expected, found = (
            run(layer, x, grad, kernels)
            for layer, kernels in zip(layers, ("reference", "cpu"), strict=True)
        )
        assert layout_of(found[0]) == layout_of(x)
        for ours, theirs in zip(found, expected, strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            assert_close(ours, theirs, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"estimates", "switched, two"}))
def test_running_statistics_that_average_all_batches_alike(name):
    layers = [build(name, 8, momentum=None) for _ in range(2)]
    for seed in range(3):
        x = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(seed)).double() + seed
        for layer, kernels in zip(layers, ("reference", "cpu"), strict=True):
            with nk.use_kernels(kernels):
                layer(x)
    for ours, theirs in zip(layers[1].buffers(), layers[0].buffers(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_threads_change_rounding_only_and_repetition_nothing(name):
    x, grad = draw((8, 520, 9, 9), torch.float32)

    def on(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run(build(name, 520, torch.float32), x, grad, "cpu")
        finally:
            torch.set_num_threads(before)

    one, two, again = on(1), on(2), on(2)
    for first, second, repeated in zip(one, two, again, strict=True):
        assert torch.equal(second, repeated)
        assert_close(second, first, rtol=1e-5, atol=1e-5)


def operators_of(graph):
    """Names of our operators that a graph calls, also where torch wraps them."""
    names = [str(node.target) for node in graph.graph.nodes]
    names += [str(a) for node in graph.graph.nodes for a in node.args]
    return {name.split(".")[1] for name in names if name.startswith("normkit.")}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_compilation_keeps_the_operators_and_their_precision(name, training):
    """At a mean of 1e4, where float32 has lost three digits, results are those of eager calls."""
    x, grad = draw((4, 8, 5, 3), torch.float32, mean=1e4)
    found = set()

    def note(graph, _):
        found.update(operators_of(graph))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    layers = [build(name, 8, torch.float32) for _ in range(2)]
    calls = [
        layers[0],
        torch.compile(layers[1], fullgraph=True, backend=aot_autograd(fw_compiler=note)),
    ]
    results = []
    for layer, call in zip(layers, calls, strict=True):
        layer(x)
        layer.train(training)
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        gradients = torch.autograd.grad(y, (leaf, *layer.parameters()), grad)
        results.append([y.detach(), *gradients, *layer.buffers()])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=2e-7, atol=1e-6)
    assert {"composite_forward", "composite_backward"} <= found


@pytest.mark.parametrize("case", ["narrow", "averaged"])
def test_buffers_that_the_operator_cannot_move_follow_a_compiled_layer(case):
    options = {"momentum": None} if case == "averaged" else {}
    x, _ = draw((4, 8, 5, 3), torch.float32)
    torch.compiler.reset()
    layers = [build("group first", 8, torch.float32, **options) for _ in range(2)]
    if case == "narrow":
        layers = [layer.bfloat16() for layer in layers]
        x = x.bfloat16()
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    for scale in (1, 3):
        assert_close(compiled(x * scale), layers[0](x * scale))
    for ours, theirs in zip(layers[1].buffers(), layers[0].buffers(), strict=True):
        assert_close(ours, theirs)


def test_16_bit_estimates_of_the_functional_form_are_moved_by_the_algebra():
    x, _ = draw((4, 8, 5))
    narrow = [torch.zeros(8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)]
    wide = [b.double() for b in narrow]
    for buffers in (narrow, wide):
        nk.functional.batch_channel_norm(x, 4, *buffers, training=True, update_rate=0.5)
    for ours, theirs in zip(narrow, wide, strict=True):
        assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", range(7))
def test_fake_kernels_tell_the_truth(kind):
    operators = torch.ops.normkit
    x, grad = draw((4, 6, 3, 5), torch.float32)
    logits = torch.rand(2 if kind == 5 else 3)
    third, fourth = {1: (torch.rand(()), None), 4: (logits, logits)}.get(
        {2: 1, 3: 1, 5: 4}.get(kind, kind), (torch.rand(3), torch.rand(3))
    )
    parameters = (torch.rand(6), None, third, fourth)
    if kind == 6:
        parameters = (torch.rand(3), torch.rand(3), torch.rand(3), None)
    num_batch = {5: 0, 6: 3}.get(kind, 6)
    running = (torch.zeros(num_batch), torch.ones(num_batch), torch.tensor(0))
    options = (3, 1e-5, 1e-4, 0, 0.1)
    given = (x, kind, *parameters, *options, None, None, *running)
    _, table = operators.composite_forward(*given)
    torch.library.opcheck(operators.composite_forward.default, given)
    torch.library.opcheck(
        operators.composite_backward.default,
        (grad, x, table, kind, *parameters, *options, 0b0101),
    )


def test_what_does_not_fit_is_refused():
    x, _ = draw((4, 6, 3), torch.float32)
    forward = torch.ops.normkit.composite_forward
    nothing = (None, None, None, None)
    with pytest.raises(RuntimeError, match="4 groups do not divide 6 channels"):
        forward(x, 0, *nothing, 4, 1e-5, 1e-5, 0, 0.1)
    with pytest.raises(RuntimeError, match="a parameter of 4 values does not fit 6 channels"):
        forward(x, 0, torch.ones(4), None, None, None, 3, 1e-5, 1e-5, 0, 0.1)
    with pytest.raises(RuntimeError, match="the batch stage's statistics have 6 values"):
        forward(x, 0, *nothing, 3, 1e-5, 1e-5, 2, 0.0, torch.zeros(5), torch.ones(5))
    mean, var = torch.zeros(6), torch.ones(6)
    with pytest.raises(RuntimeError, match="a parameter of 2 values"):
        forward(x, 0, *nothing[:3], torch.ones(2), 3, 1e-5, 1e-5, 1, 0.5, None, None, mean, var)
    assert torch.equal(mean, torch.zeros(6))  # nothing has moved
    with pytest.raises(RuntimeError, match="a mixture needs its logit"):
        forward(x, 1, *nothing, 3, 1e-5, 1e-5, 0, 0.1)
    with pytest.raises(RuntimeError, match="there are 3 logits"):
        forward(x, 4, *nothing, 1, 1e-5, 1e-5, 0, 0.1)
    with pytest.raises(RuntimeError, match="there are 3 logits"):
        forward(x, 4, None, None, torch.ones(2), torch.ones(3), 1, 1e-5, 1e-5, 0, 0.1)
    with pytest.raises(
        RuntimeError, match="halves leave both norms a channel of 6; the first has 6"
    ):
        forward(x, 6, *nothing, 6, 1e-5, 1e-5, 0, 0.1)
    with pytest.raises(RuntimeError, match="composites take no empty maps"):
        forward(x[:0], 0, *nothing, 3, 1e-5, 1e-5, 0, 0.1)
