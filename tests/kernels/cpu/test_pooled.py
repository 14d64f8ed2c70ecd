"""The pooled operators against their definition, and what a kernel can get wrong besides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kernels.cpu import definition
from normkit.kernels import calls, cpu, nodes


def pooled(*arguments):
    return nodes.normalize_pooled(cpu.operators, *arguments)


pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")

TOLERANCE = {  # relative to the largest expected value
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
SHAPES = [
    (2, 6, 5, 7),  # no spatial axis is a power of two
    (4, 6),  # no positions at all
    (9, 6, 2, 2),  # planes shorter than any vector
    (5, 4, 3, 2, 4),  # rank 5
    (3, 4, 100),  # rank 3
    (1, 6, 1, 1),  # one value in some groups
    (7, 96, 1, 1),  # more channels than the widest vector, with a tail
    (33, 66, 7, 7),  # short rows, more channels and examples than are taken together
    (2, 3, 150, 301),  # groups large enough to be shared by threads
]
LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": definition.channels_last}


def groupings(shape):
    """(num_groups, examples_per_group): the seven layers, cut channels and remainders."""
    num_channels = shape[1]
    size = torch.Size(shape[1:]).numel()
    counts = {1, num_channels, num_channels // 2, 2 * num_channels, size // 2, 3}
    counts = sorted(g for g in counts if g > 0 and size % g == 0 and g <= 500)
    return [(g, e) for g in counts for e in (0, 1, 2)]


def draw(shape, dtype, layout="contiguous", offset=0.0, seed=0):
    """Feature map and gradient in this layout and dtype, weight and bias in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    weight, bias = torch.rand(2, shape[1], dtype=torch.float64, generator=generator)
    x, grad = (LAYOUTS[layout](t.to(dtype)) for t in (x * 2 + offset, grad))
    return x, grad, weight + 0.5, bias


def parameter_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel():
        scale = expected.abs().max().clamp(min=1)
        assert_close(actual.double() / scale, expected / scale, atol=tolerance, rtol=0)


def check(shape, dtype, layout, grouping, affine=True):
    x, grad, weight, bias = draw(shape, dtype, layout)
    if not affine:
        weight = bias = None
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    y, mean, var = definition.normalize(*exact, *grouping)
    wanted = [t for t in exact if t is not None]
    expected = torch.autograd.grad(y, wanted, grad.double())

    inputs = [x.detach().requires_grad_()]
    if affine:
        inputs += [t.to(parameter_dtype(dtype)).requires_grad_() for t in (weight, bias)]
    padded = [*inputs, None, None][:3]
    pooling = calls.Pooling(*grouping, 1e-5)
    result, table = pooled(*padded, pooling)
    tables = calls.split_table(table, x.shape[1], pooling)
    assert result.dtype == dtype
    assert result.stride() == x.stride()
    tolerance = TOLERANCE[dtype]
    near(result, y.detach(), tolerance)
    near(tables.mean.flatten(), mean.detach(), tolerance)
    near(tables.var.flatten(), var.detach(), tolerance)
    # a group of one or two values has a variance near 0: its rstd magnifies the rounding of x
    magnified = tolerance * (var.min().item() + 1e-5) ** -0.5
    for actual, one in zip(torch.autograd.grad(result, inputs, grad), expected, strict=True):
        near(actual, one, max(tolerance, magnified))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_tables_and_gradients_are_those_of_the_definition(shape, layout):
    for grouping in groupings(shape):
        check(shape, torch.float32, layout, grouping)
        check(shape, torch.float32, layout, grouping, affine=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (5, 20, 3, 3), (6, 40), (2, 3, 37, 53)], ids=str)
def test_every_dtype_is_read_and_written(shape, dtype, layout):
    for grouping in groupings(shape):
        check(shape, dtype, layout, grouping)


@settings(max_examples=40, deadline=None)
@given(
    num_examples=st.integers(1, 9),
    num_channels=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 9), max_size=3),
    examples_per_group=st.integers(0, 4),
    layout=st.sampled_from(list(LAYOUTS)),
    data=st.data(),
)
def test_any_shape_and_grouping(
    num_examples, num_channels, sizes, examples_per_group, layout, data
):
    shape = (num_examples, num_channels, *sizes)
    size = torch.Size(shape[1:]).numel()
    divisors = [g for g in range(1, min(size, 300) + 1) if size % g == 0]
    grouping = (data.draw(st.sampled_from(divisors)), examples_per_group)
    check(shape, torch.float64, layout, grouping)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouping", [(64, 0), (32, 1), (1, 1), (64, 1), (64, 3)], ids=str)
def test_a_large_offset_costs_no_more_than_the_rounding_of_x(grouping, layout):
    x, grad, weight, bias = draw((8, 64, 9, 11), torch.float32, layout, offset=1e4)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y, _, _ = definition.normalize(*exact, *grouping)
    expected = torch.autograd.grad(y, exact, grad.double())
    inputs = [t.float().detach().requires_grad_() for t in (x, weight, bias)]
    result, _ = pooled(*inputs, calls.Pooling(*grouping, 1e-5))
    near(result, y.detach(), 1e-6)
    for actual, one in zip(torch.autograd.grad(result, inputs, grad), expected, strict=True):
        near(actual, one, 1e-6)
    theirs = torch.nn.functional.group_norm(inputs[0], 32, inputs[1], inputs[2])
    if grouping == (32, 1):
        assert (result - y).abs().max() < (theirs - y).abs().max() / 10


@pytest.mark.parametrize("outlier", [1e6, -1e6])
def test_an_outlier_at_the_pivot_does_not_spoil_the_variance(outlier):
    x = torch.randn(1, 1, 1000, 1000, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = outlier
    _, table = pooled(x, None, None, calls.Pooling(1, 0, 1e-5))
    assert_close(table[1], x.double().var(correction=0)[None], rtol=2e-3, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3), (0, 4)], ids=str)
def test_an_empty_map_gives_empty_results_and_zero_gradients(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.ones(shape[1], requires_grad=True) for _ in range(2))
    running = calls.Running(torch.zeros(2), torch.ones(2), torch.tensor(0), 0.1)
    y, _ = nodes.normalize_pooled(
        cpu.operators, x, weight, bias, calls.Pooling(2, 0, 1e-5), running
    )
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == torch.Size(shape)
    assert not dweight.any()
    assert not dbias.any()
    assert running.num_batches_tracked == 0
    assert running.var.tolist() == [1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouping", [(6, 2), (2, 2), (6, 0), (1, 3), (12, 2)], ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 4, 6), (9, 6, 2, 2)], ids=str)
def test_channel_statistics_are_those_of_the_whole_batch(shape, grouping, layout):
    x, *_ = draw(shape, torch.float32, layout, offset=3)
    pooling = calls.Pooling(*grouping, 1e-5, True)
    running = calls.Running(torch.zeros(6), torch.ones(6), torch.tensor(4), 0.25)
    _, table = pooled(x, None, None, pooling, running)
    values = x.double().movedim(1, 0).reshape(6, -1)
    tables = calls.split_table(table, x.shape[1], pooling)
    near(tables.channel_mean, values.mean(1), 1e-6)
    near(tables.channel_var, values.var(1, correction=0), 1e-6)
    assert_close(running.mean, 0.25 * values.mean(1).float())
    assert_close(running.var, 0.75 + 0.25 * values.var(1).float())
    assert running.num_batches_tracked == 5


def test_running_statistics_of_batch_norm_are_those_of_torch():
    x, *_ = draw((4, 6, 3, 5), torch.float32)
    theirs = torch.nn.BatchNorm2d(6)
    theirs(x)
    running = calls.Running(torch.zeros(6), torch.ones(6), torch.tensor(0), 0.1)
    pooled(x, None, None, calls.Pooling(6, 0, 1e-5), running)
    assert_close(running.mean, theirs.running_mean)
    assert_close(running.var, theirs.running_var)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouping", [(16, 0), (4, 1), (1, 1), (16, 3), (2, 0)], ids=str)
def test_threads_change_rounding_only_and_repetition_nothing(grouping, layout):
    x, grad, weight, bias = draw((6, 16, 60, 70), torch.float32, layout)
    weight, bias = weight.float(), bias.float()

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
            y, table = nodes.normalize_pooled(
                cpu.operators, *inputs, calls.Pooling(*grouping, 1e-5)
            )
            return [y.detach(), table, *torch.autograd.grad(y, inputs, grad)]
        finally:
            torch.set_num_threads(before)

    one, two, again = run(1), run(2), run(2)
    for first, second, repeated in zip(one, two, again, strict=True):
        assert torch.equal(second, repeated)
        near(second, first.double(), 1e-6)


def test_a_strided_map_or_gradient_is_copied_not_misread():
    x = torch.randn(4, 6, 8, 10, dtype=torch.float64)[:, ::2, 1:, ::3].requires_grad_()
    expected, _, _ = definition.normalize(x, None, None, 3, 0)
    y, _ = pooled(x, None, None, calls.Pooling(3, 0, 1e-5))
    assert_close(y, expected)
    grad = torch.ones(()).double().expand_as(y)
    assert_close(
        torch.autograd.grad((y * y).sum() + (y * grad).sum(), x),
        torch.autograd.grad((expected * expected).sum() + expected.sum(), x),
        atol=1e-12,
        rtol=0,
    )


def test_each_gradient_alone():
    x, grad, weight, bias = draw((3, 4, 5, 5), torch.float64)
    sources = [t.requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(definition.normalize(*sources, 4, 0)[0], sources, grad)
    for index, one in enumerate(expected):
        inputs = [t.detach().requires_grad_(i == index) for i, t in enumerate(sources)]
        y, _ = pooled(*inputs, calls.Pooling(4, 0, 1e-5))
        assert_close(torch.autograd.grad(y, inputs[index], grad)[0], one)


def test_a_gradient_has_its_parameters_dtype():
    x = torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)
    weight, bias = (torch.ones(4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    y, _ = pooled(x, weight, bias, calls.Pooling(4, 0, 1e-5))
    grads = torch.autograd.grad(y.float().square().sum(), (weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2


def test_nothing_but_the_input_and_tables_is_kept():
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pooled(x, weight, bias, calls.Pooling(8, 0, 1e-5))
    assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) <= 8 + 2 * 8


def test_a_second_derivative_is_refused_or_routed():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y, _ = pooled(x, None, None, calls.Pooling(4, 0, 1e-5))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)

    def differentiable(grad, x, weight, wanted):
        plain = definition.normalize(x, weight, None, 4, 0)[0]
        return *torch.autograd.grad(plain, x, grad, create_graph=True), None, None

    def normalized(x):
        return nodes.normalize_pooled(
            cpu.operators, x, None, None, calls.Pooling(4, 0, 1e-5), None, differentiable
        )[0]

    assert torch.autograd.gradcheck(normalized, x)
    assert torch.autograd.gradgradcheck(normalized, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 6, 3, 3), 4, 0), "54 elements, which 4 groups do not divide"),
        (((6,), 1, 0), r"shape \(N, C, \*S\)"),
    ],
)
def test_what_the_operator_cannot_take_is_refused(arguments, message):
    shape, num_groups, examples = arguments
    with pytest.raises(RuntimeError, match=message):
        nodes.normalize_pooled(
            cpu.operators, torch.ones(shape), None, None, calls.Pooling(num_groups, examples, 0.0)
        )
    with pytest.raises(RuntimeError, match="take float32, float64, bfloat16 and float16"):
        nodes.normalize_pooled(
            cpu.operators, torch.ones(2, 2).int(), None, None, calls.Pooling(1, 0, 0.0)
        )
