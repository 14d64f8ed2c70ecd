"""The composites' operator: wide and deep tables, every source of statistics, threads, tracers."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

import normkit as nk
from normkit.core.composite import (
    Composite,
    batch_then_group,
    group_and_batch,
    instance_beside_batch,
    switched,
)
from normkit.core.trace import programs_of

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


FORMULAS = {  # what is computed, and how many values each parameter has
    "batch then group": (Composite(batch_then_group, (3, 1e-4), 1e-5), (6, None, 3, 3)),
    "group first": (Composite(group_and_batch, (3, 1e-4, "group-first"), 1e-5), (6, None, 1)),
    "batch first": (Composite(group_and_batch, (3, 1e-4, "batch-first"), 1e-5), (6, None, 1)),
    "parallel": (Composite(group_and_batch, (3, 1e-4, "parallel"), 1e-5), (6, None, 1)),
    "switched": (Composite(switched, (1e-5, True), 1e-5), (6, None, 3, 3)),
    "switched, two": (Composite(switched, (1e-5, False), 1e-5, has_batch=False), (6, 6, 2, 2)),
    "halves": (Composite(instance_beside_batch, (3, 1e-4), 1e-5, num_beside=3), (3, 3, 3, None)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_fake_kernels_tell_the_truth(name):
    operators = torch.ops.normkit
    composite, sizes = FORMULAS[name]
    x, grad = draw((4, 6, 3, 5), torch.float32)
    parameters = [None if n is None else torch.rand(n) for n in (*sizes, None)[:4]]
    num_batch = composite.num_batch_channels(6)
    running = (torch.zeros(num_batch), torch.ones(num_batch), torch.tensor(0))
    programs = programs_of(composite, 6, sizes, "own")
    given = (x, programs.forward, *parameters, 0.1, None, None, *running)
    _, table = operators.composite_forward(*given)
    torch.library.opcheck(operators.composite_forward.default, given)
    torch.library.opcheck(
        operators.composite_backward.default,
        (grad, x, table, programs.backward, *parameters, 0.1, 0b0101),
    )
    given = (x, grad, programs.forward, *parameters, 0.1, 3, 0.0, None, None, *running)
    _, table, factors = operators.ended_composite_forward(*given)
    torch.library.opcheck(operators.ended_composite_forward.default, given)
    for needs in (True, False):
        backward = (programs.backward, *parameters, 0.1, 3, 0.0, needs, 0b0101)
        torch.library.opcheck(
            operators.ended_composite_backward.default,
            (grad, x, table, factors, grad, None, *backward),
        )


def test_parameters_and_groups_that_do_not_fit_are_refused():
    composite, sizes = FORMULAS["batch then group"]
    with pytest.raises(nk.PartitionError, match="4 groups do not divide 6 channels"):
        programs_of(composite._replace(options=(4, 1e-5)), 6, sizes, "own")
    with pytest.raises(nk.InputError, match="4 and 6 channels do not fit"):
        programs_of(composite, 6, (4, None, 3, 3), "own")
    beside, _ = FORMULAS["halves"]
    with pytest.raises(nk.InputError, match="2 and 3 channels do not fit"):
        programs_of(beside, 6, (2, None, 3, None), "own")


def test_what_does_not_fit_is_refused():
    x, _ = draw((4, 6, 3), torch.float32)
    forward = torch.ops.normkit.composite_forward
    composite, sizes = FORMULAS["batch then group"]
    parameters = [None if n is None else torch.ones(n) for n in sizes]
    text = programs_of(composite, 6, sizes, "own").forward
    with pytest.raises(RuntimeError, match="5 values where 6 are needed"):
        forward(x, text, torch.ones(5), *parameters[1:], 0.1)
    given = programs_of(composite, 6, sizes, "given").forward
    with pytest.raises(RuntimeError, match="5 values where 6 are needed"):
        forward(x, given, *parameters, 0.0, torch.zeros(5), torch.ones(5))
    mean, var = torch.zeros(6), torch.ones(6)
    estimates = programs_of(composite, 6, sizes, "estimates").forward
    with pytest.raises(RuntimeError, match="2 values where 3 are needed"):
        forward(x, estimates, *parameters[:3], torch.ones(2), 0.5, None, None, mean, var)
    assert torch.equal(mean, torch.zeros(6))  # nothing has moved
    with pytest.raises(RuntimeError, match="asks for a tensor that was not given"):
        forward(x, text, None, *parameters[1:], 0.1)
    with pytest.raises(RuntimeError, match="composites take no empty maps"):
        forward(x[:0], text, *parameters, 0.1)
    with pytest.raises(RuntimeError, match="for 6 channels, and the map has 5"):
        forward(x[:, :5], text, *parameters, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with its channels"),
        ("6 nothing 6 7", "begins with its channels"),
        ("6 nothing 6 0\nN 6 median", "no program on tables has a step"),
        ("6 nothing 6 0\nN 6 mean\nN 6 add 0 1", "take tables that are there|takes tables"),
        ("6 nothing 6 0\nN 5 mean", "do not fit"),
        ("6 nothing 6 0\nN 6 mean\n1 4 parameter 0\nN 6 add 0 1", "do not fit"),
        ("6 nothing 6 0\nN 6 mean\nN 4 slice 0 3", "do not fit"),
        ("6 nothing 6 0\nN 6 mean\n= scale 2", "one of its steps"),
        ("6 nothing 6 0\nN 6 mean\nN 4 slice 0 2\n= scale 1", "result scale has 4 columns"),
        ("6 nothing 6 0\nN 6 mean\n= scale 0", "to have a result center"),
        ("6 nothing 6 6\nN 6 mean\n1 3 parameter 0\n= kept_mean 1", "keeps 6 columns"),
    ],
)
def test_a_text_that_is_no_program_is_refused(text, message):
    x, _ = draw((4, 6, 3), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.normkit.composite_forward(x, text, torch.ones(3), None, None, None, 0.1)
