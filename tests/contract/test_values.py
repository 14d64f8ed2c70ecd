"""Values, gradients and buffers of every layer against the float64 oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import normkit as nk
import oracle
from cases import CASES, COMPOSITES, EVERY, TOLERANCE, Case, case_shapes, groups, randn, statistics
from values import arrange, buffers_of, gradients, in_float64, parameters_for, scaled

pytestmark = pytest.mark.usefixtures("kernels")
LAYOUTS = ("contiguous", "channels_last", "sliced")
SLOW_OR_PICKY = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def expected_training(case, layer, buffers, x, grad):
    """Oracle's output and its gradients of x and every parameter, in float64."""
    x = x.detach().double().requires_grad_()
    parameters = in_float64(layer)
    y = oracle.train(case.kind, x, parameters, layer.eps, buffers, **groups(case))
    return y.detach(), torch.autograd.grad(y, [x, *parameters.values()], grad.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "shape"), **case_shapes(CASES))
def test_training_matches_its_definition(case, shape, dtype, layout):
    check_training(case, shape, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "shape"), **case_shapes(COMPOSITES))
def test_training_of_composites_matches_their_definition(case, shape, dtype, layout):
    check_training(case, shape, dtype, layout)


def check_training(case, shape, dtype, layout):
    if dtype in (torch.bfloat16, torch.float16) and layout == "sliced":
        layout = "contiguous"
    layer = case.make(dtype=parameters_for(dtype))
    x = arrange(randn(*shape, dtype=dtype, mean=0.5), layout).requires_grad_()
    grad = randn(*shape, dtype=dtype, seed=1)
    buffers = buffers_of(case, layer)
    y = layer(x)
    found = gradients(y, x, layer, grad)
    value, expected = expected_training(case, layer, buffers, x, grad)
    tolerance = TOLERANCE[dtype]
    assert y.dtype == dtype
    assert layout_of(y) == layout_of(torch.empty_like(x))
    assert_close(y.double(), value, **scaled(tolerance, value))
    assert_close(found[0].double(), expected[0], **scaled(tolerance, expected[0]))
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert_close(ours.double(), theirs, **scaled(tolerance, theirs))


def layout_of(x):
    """Strides of the axes that have more than one element; the others' mean nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "shape"), **case_shapes([c for c in EVERY if c.tracks]))
def test_buffers_match_their_definition(case, shape, dtype):
    layer = case.make(dtype=parameters_for(dtype))
    expected = buffers_of(case, layer)
    for step in range(3):
        x = randn(*shape, seed=step, mean=step, dtype=dtype)
        layer(x)
        parameters = in_float64(layer)
        expected = oracle.follow(
            case.kind, x.double(), expected, parameters, layer.eps, **groups(case)
        )
    tolerance = TOLERANCE[parameters_for(dtype)]
    for ours, theirs in zip(buffers_of(case, layer), expected, strict=True):
        assert_close(ours, theirs, **tolerance)
    assert statistics(layer).num_batches_tracked == 3


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "shape"), **case_shapes([c for c in EVERY if c.tracks]))
def test_evaluation_matches_its_definition(case, shape, dtype, alpha):
    layer = trained(case, shape, dtype)
    layer.example_weight = alpha
    x = randn(*shape, seed=5, mean=1.0, dtype=dtype).requires_grad_()
    grad = randn(*shape, seed=6, dtype=dtype)
    y = layer(x)
    x64, parameters = x.detach().double().requires_grad_(), in_float64(layer)
    running, options = buffers_of(case, layer), groups(case)
    expected = oracle.evaluate(case.kind, x64, parameters, layer.eps, running, alpha, **options)
    assert_close(y.double(), expected.detach(), **scaled(TOLERANCE[dtype], expected))
    found = gradients(y, x, layer, grad)
    wanted = torch.autograd.grad(expected, [x64, *parameters.values()], grad.double())
    for ours, theirs in zip(found, wanted, strict=True):
        tolerance = scaled(TOLERANCE[dtype], theirs)
        # a group of one value is scaled by 1 / sqrt(eps) = 316, and again by the next stage
        tolerance["atol"] *= 128 if case in COMPOSITES else 8
        assert_close(ours.double(), theirs, **tolerance)


def trained(case, shape, dtype):
    """The layer after one training step, in evaluation mode."""
    layer = case.make(dtype=parameters_for(dtype))
    layer(randn(*shape, mean=0.5, dtype=dtype))
    return layer.eval()


@pytest.mark.parametrize("case", [c for c in EVERY if not c.tracks], ids=str)
def test_evaluation_without_buffers_is_training(case):
    layer = case.make(dtype=torch.float64)
    x = randn(4, 6, 5, 7)
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_an_offset_costs_only_what_its_rounding_costs(case, offset, kernels):
    shape = SHAPES_UNDER_OFFSET.get(case.kind, (4, 6, 5, 7))
    layer = case.make()
    x = randn(*shape, mean=offset, dtype=torch.float32).requires_grad_()
    grad = randn(*shape, seed=1, dtype=torch.float32)
    buffers = buffers_of(case, layer)
    y = layer(x)
    found = gradients(y, x, layer, grad)
    value, expected = expected_training(case, layer, buffers, x, grad)
    rounding = 4 * offset * torch.finfo(torch.float32).eps  # of a float32 mean at this offset
    rounding *= 4 if case in COMPOSITES else 1  # gradients of differences of such means
    # the C++ kernels keep means in float64: it costs nothing; whitening has no kernels of its own
    rounding *= kernels == "reference" or case.kind == "gw"
    assert_close(y.double(), value, **scaled({"atol": 2e-5 + rounding, "rtol": 2e-5}, value))
    for ours, theirs in zip(found, expected, strict=True):
        largest = max(1.0, theirs.abs().max().item())
        assert_close(ours.double(), theirs, atol=(2e-5 + rounding) * largest, rtol=2e-5)


SHAPES_UNDER_OFFSET = {"bgn": (4, 6, 3, 3)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_first_and_second_derivatives(case, training):
    layer = case.make(dtype=torch.float64)
    x = randn(3, 6, 3).requires_grad_()
    layer(x.detach())
    layer.train(training)
    for holder in layer.modules():
        if hasattr(holder, "update_rate"):
            holder.momentum = 0.0  # estimates that move with every call have no derivative
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in layer.parameters()))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs, fast_mode=True)


def draw_case(case):
    """Shapes that the case's groups divide, empty batches and odd sizes included."""
    spatial = st.lists(st.integers(1, 5), max_size=3)
    return st.tuples(st.just(case), st.integers(0, 7), spatial, st.floats(0, 1e4))


@settings(max_examples=250, deadline=None, suppress_health_check=SLOW_OR_PICKY)
@given(drawn=st.one_of([draw_case(case) for case in CASES]))
def test_any_shape_matches_the_definition(drawn):
    case, num_examples, spatial, offset = drawn
    shape = (num_examples, 6, *spatial)
    if refused(case, shape):
        return
    layer = case.make(dtype=torch.float64)
    x = randn(*shape, mean=offset)
    y = layer(x)
    ids = oracle.group_ids(case.kind, shape, **groups(case))
    expected = oracle.normalize(x, ids, layer.weight, layer.bias, layer.eps)
    atol = 1e-10 + 10 * offset * torch.finfo(torch.float64).eps
    if smallest_spread(x, ids) > 1e-3:
        assert_close(y, expected, atol=atol * 1e3, rtol=1e-10)


def smallest_spread(x, ids):
    """Smallest variance of a group: two nearly equal values amplify rounding without bound."""
    return group_variances(x, ids).min() if x.numel() else 1.0


def group_variances(x, ids):
    return oracle.group_moments(x, ids)[1]


def refused(case: Case, shape):
    """Whether the groups do not divide, or one has a single value."""
    if 0 in shape:
        return False
    per_example = torch.Size(shape[1:]).numel()
    if case.kind == "bgn" and per_example % case.options["num_groups"]:
        return True
    return bool((oracle.group_ids(case.kind, shape, **groups(case)).unique(return_counts=True)[1]
                 == 1).any())  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(COMPOSITES),
    num_examples=st.integers(0, 5),
    spatial=st.lists(st.integers(1, 5), max_size=3),
)
def test_any_shape_matches_the_definition_of_composites(case, num_examples, spatial):
    shape = (num_examples, 6, *spatial)
    layer = case.make(dtype=torch.float64)
    x = randn(*shape)
    buffers = buffers_of(case, layer)
    try:
        y = layer(x)
    except nk.PartitionError:
        assert any(refused(part, shape) for part in PARTS[case.kind])
        return
    if x.numel():
        parameters = in_float64(layer)
        expected = oracle.train(case.kind, x, parameters, layer.eps, buffers, **groups(case))
        assert_close(y, expected.detach(), atol=1e-6, rtol=1e-6)


BN = Case(name="bn", layer=nk.BatchNorm, kind="bn")
IN = Case(name="in", layer=nk.InstanceNorm, kind="in")
LN = Case(name="ln", layer=nk.LayerNorm, kind="ln")
GN2, GN3 = (
    Case(name="gn", layer=nk.GroupNorm, kind="gn", options={"num_groups": n}) for n in (2, 3)
)
PARTS = {
    "gnplus": (BN, GN2, GN3),
    "bcn": (BN, GN2, GN3),
    "bcn-micro": (GN3,),
    "sn": (BN, LN),
    "ibn": (IN, BN),
    "gw": (GN3,),
}
"""The norms whose groups may be too small for a composite."""


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_an_empty_batch_changes_nothing(case):
    layer = case.make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.zeros(0, 6, 5, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    assert x.grad.shape == x.shape
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_without_affine(case):
    layer = case.layer(6, **case.options, affine=False, dtype=torch.float64)
    full = case.layer(6, **case.options, dtype=torch.float64)
    x = randn(3, 6, 3)
    buffers = buffers_of(case, layer)
    expected = oracle.train(
        case.kind, x, dict(full.named_parameters()), layer.eps, buffers, **groups(case)
    )
    assert_close(layer(x), expected.detach(), atol=1e-10, rtol=0)
    assert {n.rpartition(".")[2] for n, _ in layer.named_parameters()}.isdisjoint(
        {"weight", "bias"}
    )


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12),
    case=st.sampled_from(CASES),
)
def test_an_output_is_at_most_the_root_of_n_minus_one(values, case):
    """Summers & Dinneen, eq. 2: with n values in a group."""
    x = torch.tensor(values, dtype=torch.float64).reshape(2, 6, 1)
    if refused(case, x.shape):
        return
    layer = case.layer(6, **case.options, affine=False, dtype=torch.float64)
    _, counts = oracle.group_ids(case.kind, x.shape, **groups(case)).unique(return_counts=True)
    assert layer(x).abs().max() <= (counts.max().item() - 1) ** 0.5 + 1e-9


@pytest.mark.parametrize("case", [c for c in EVERY if c.kind != "gw"], ids=str)
def test_only_the_input_and_tables_are_kept_for_backward(case):
    layer = case.make()
    x = randn(4, 6, 12, 12, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    maps = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
    assert maps <= {x.untyped_storage().data_ptr()}
    tables = sum(t.numel() for t in kept if t.numel() != x.numel())
    assert tables <= 4 * 4 * max(6 * 9, 144)
