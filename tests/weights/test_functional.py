import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import normkit as nk
from normkit import weights
from normkit.lab.torchvision_ops import register_missing_operators
from weights import definition

register_missing_operators()
from timm.layers import ScaledStdConv2d, StdConv2d  # noqa: E402 - its operators come first

SHAPES = {
    "conv1d": (5, 3, 7),
    "conv2d": (6, 3, 3, 5),  # a kernel that is not square
    "conv3d": (4, 2, 1, 2, 3),
    "depthwise": (6, 1, 3, 3),
    "linear": (7, 11),
    "one_filter": (1, 2, 1, 1),  # two values: the smallest with a variance
}
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}
VARIANTS = [
    {},
    {"eps": 1e-3},
    {"unbiased": True},
    {"unbiased": True, "eps_to": "std"},
    {"center": False},
    {"scale": False},
]
TRANSPOSED = [((6, 4, 3), 1), ((6, 4, 3, 2), 3), ((4, 1, 3, 3), 4), ((2, 3, 2, 1, 2), 2)]


def drawn(shape, dtype=torch.float64, offset=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (values + offset).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_standardization_is_its_definition(shape, variant, dtype):
    weight = drawn(shape, dtype)
    found = weights.standardize(weight, **variant)
    assert found.dtype == dtype
    expected = definition.standardized(weight, **variant)
    assert_close(found.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), TRANSPOSED)
def test_transposed_filters_are_runs_of_the_input_channels(shape, groups, variant):
    weight, at = drawn(shape), {"channel_axis": 1, "groups": groups}
    found = weights.standardize(weight, **variant, **at)
    assert_close(found, definition.standardized(weight, **variant, **at), **TOLERANCE[weight.dtype])
    gain = torch.arange(1.0, 1 + shape[1] * groups, dtype=torch.float64)
    for center, function in ((False, weights.weight_norm), (True, weights.centered_weight_norm)):
        expected = definition.unit_length(weight, gain, center, **at)
        assert_close(function(weight, gain, **at), expected, **TOLERANCE[weight.dtype])


def test_a_transposed_weight_without_groups_is_the_transpose():
    weight = drawn((6, 4, 3, 2))
    turned = weights.standardize(weight.transpose(0, 1).contiguous()).transpose(0, 1)
    assert_close(weights.standardize(weight, channel_axis=1), turned)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_lengths_are_their_definition(shape):
    weight, gain = drawn(shape), torch.arange(1.0, 1 + shape[0], dtype=torch.float64)
    tolerance = TOLERANCE[torch.float64]
    plain, centered = (definition.unit_length(weight, gain, center) for center in (False, True))
    assert_close(weights.weight_norm(weight, gain), plain, **tolerance)
    assert_close(weights.centered_weight_norm(weight, gain), centered, **tolerance)
    unit = weights.centered_weight_norm(weight)
    assert_close(unit.flatten(1).norm(dim=1), torch.ones(shape[0], dtype=torch.float64))


def test_weight_norm_is_torchs():
    weight, gain = drawn((6, 3, 3, 3)), torch.rand(6, dtype=torch.float64) + 0.5
    theirs = torch._weight_norm(weight, gain[:, None, None, None], 0)
    assert_close(weights.weight_norm(weight, gain), theirs)


def test_standardization_is_centred_weight_norm_with_the_root_of_the_fan_in():
    weight = drawn((6, 4, 3, 3))
    gain = torch.full((6,), 36**0.5, dtype=torch.float64)
    assert_close(weights.standardize(weight, eps=0), weights.centered_weight_norm(weight, gain))


def test_gain_and_offset_come_after():
    weight, gain, offset = drawn((6, 3, 2)), drawn((6,)), drawn((6,), offset=3.0)
    for variant in VARIANTS:
        plain = definition.standardized(weight, **variant)
        expected = gain[:, None, None] * plain + offset[:, None, None]
        found = weights.standardize(weight, gain=gain, offset=offset, **variant)
        assert_close(found, expected, **TOLERANCE[weight.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_mean_far_above_the_deviation_does_not_cancel(dtype):
    offset = {torch.float64: 1e6, torch.float32: 1e3, torch.bfloat16: 8.0}[dtype]
    weight = drawn((4, 8, 3, 3), dtype, offset)
    expected = definition.standardized(weight)
    assert_close(weights.standardize(weight).double(), expected, rtol=1e-2, atol=1e-2)


def test_the_memory_format_stays():
    weight = drawn((6, 4, 3, 5))
    found = weights.standardize(weight.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, weights.standardize(weight), check_stride=False)
    cut = drawn((6, 4, 3, 10))[..., ::2]  # neither order
    assert_close(weights.standardize(cut), definition.standardized(cut))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_derivatives_of_standardization(variant):
    weight = drawn((3, 2, 3)).requires_grad_()
    gain, offset = drawn((3,)).requires_grad_(), drawn((3,), offset=1.0).requires_grad_()

    def function(weight, gain, offset):
        return weights.standardize(weight, gain=gain, offset=offset, **variant)

    assert gradcheck(function, (weight, gain, offset))
    assert gradgradcheck(function, (weight, gain, offset))


@pytest.mark.parametrize("function", [weights.weight_norm, weights.centered_weight_norm])
def test_derivatives_of_lengths(function):
    weight, gain = drawn((3, 2, 3)).requires_grad_(), drawn((3,)).requires_grad_()
    assert gradcheck(function, (weight, gain))
    assert gradgradcheck(function, (weight, gain))


def test_standardization_projects_the_gradient_as_equations_14_and_15_say():
    weight, grad = drawn((5, 3, 3, 3)).requires_grad_(), drawn((5, 3, 3, 3), offset=0.3)
    (found,) = torch.autograd.grad(weights.standardize(weight, eps=0), weight, grad)
    rows, grads = weight.detach().flatten(1), grad.flatten(1)
    centered = rows - rows.mean(1, keepdim=True)
    deviation = centered.square().mean(1, keepdim=True).sqrt()
    unit = centered / deviation
    normed = (grads - unit * (unit * grads).mean(1, keepdim=True)) / deviation
    assert_close(found.flatten(1), normed - normed.mean(1, keepdim=True))


CONSTANT = {
    **{str(v): (lambda w, v=v: weights.standardize(w, **v)) for v in VARIANTS},
    "wn": weights.weight_norm,
    "cwn": weights.centered_weight_norm,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("function", CONSTANT.values(), ids=list(CONSTANT))
def test_constant_filters_have_finite_gradients(function, value, dtype):
    weight = drawn((3, 4, 3, 3), dtype)
    weight[1] = value
    weight.requires_grad_()
    made = function(weight)
    (grad,) = torch.autograd.grad(made, weight, torch.randn_like(made))
    assert made.isfinite().all()
    assert grad.isfinite().all()


def test_timms_formulas_are_variants():
    x = torch.randn(2, 4, 9, 9)
    plain, scaled = StdConv2d(4, 6, 3, bias=True), ScaledStdConv2d(4, 6, 3, gamma=1.7)
    torch.nn.init.uniform_(scaled.gain, 0.5, 2)
    options = {"padding": 1}
    made = weights.standardize(plain.weight, eps=1e-6)
    assert_close(torch.conv2d(x, made, plain.bias, **options), plain(x), rtol=1e-4, atol=1e-4)
    gain = scaled.gain.flatten() * 1.7 / 36**0.5
    made = weights.standardize(scaled.weight, eps=1e-6, gain=gain)
    assert_close(torch.conv2d(x, made, scaled.bias, **options), scaled(x), rtol=1e-4, atol=1e-4)


def test_kernels_agree_and_functions_transform():
    weight = drawn((6, 3, 3, 3), torch.float32)
    with nk.use_kernels("reference"):
        expected = weights.standardize(weight)
    assert_close(weights.standardize(weight), expected)
    many = torch.stack([weight, 2 * weight + 1])
    mapped = torch.vmap(lambda w: weights.standardize(w, eps=0))(many)
    assert_close(mapped[1], expected, rtol=1e-3, atol=1e-4)
    slope = torch.func.grad(lambda w: weights.standardize(w).square().sum())(weight)
    assert_close(slope, torch.zeros_like(weight), atol=1e-2, rtol=0)  # a constant but for eps


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: weights.standardize(torch.ones(4, 1, 1, 1)),
            nk.WeightError,
            "fan-in of 1.*weight_norm",
        ),
        (lambda: weights.centered_weight_norm(torch.ones(4, 1)), nk.WeightError, "fan-in of 1"),
        (
            lambda: weights.standardize(torch.ones(4)),
            nk.InputError,
            r"shape \(4,\).*an axis of out",
        ),
        (
            lambda: weights.standardize(torch.ones(4, 2).int()),
            nk.InputTypeError,
            "weight of torch.int32",
        ),
        (
            lambda: weights.standardize(torch.ones(4, 2), gain=torch.ones(2)),
            nk.InputError,
            r"gain of shape \(2,\).*each of the 4 filters",
        ),
        (
            lambda: weights.standardize(torch.ones(4, 2), offset=torch.ones(4, 1)),
            nk.InputError,
            "offset of shape",
        ),
        (lambda: weights.standardize(torch.ones(4, 2), eps=-1), nk.OptionError, "eps=-1 was given"),
        (
            lambda: weights.standardize(torch.ones(4, 2), eps_to="root"),
            nk.OptionError,
            "eps_to='root'.*'variance' or 'std'",
        ),
        (
            lambda: weights.standardize(torch.ones(4, 2), groups=2),
            nk.InputError,
            "channel_axis=0, groups=2",
        ),
        (
            lambda: weights.standardize(torch.ones(4, 2), channel_axis=2),
            nk.InputError,
            "channel_axis=2",
        ),
        (
            lambda: weights.standardize(torch.ones(4, 2, 3), channel_axis=1, groups=3),
            nk.InputError,
            "groups=3 must divide the length of its axis 0",
        ),
        (lambda: weights.weight_norm(torch.ones(4, 2), eps=-1), nk.OptionError, "eps=-1"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_weight_norm_takes_single_values():
    weight = torch.tensor([[-3.0], [2.0]])
    assert_close(weights.weight_norm(weight), torch.tensor([[-1.0], [1.0]]))


def test_the_definition_itself_numbers_grouped_filters_as_torch_does():
    """A transposed convolution of ones, one filter at a time, lights up that output channel."""
    conv = torch.nn.ConvTranspose1d(6, 6, 2, groups=3, bias=False)
    found = definition.filters(conv.weight, 1, 3)
    for number, indices in enumerate(found):
        with torch.no_grad():
            conv.weight.zero_()
            for index in indices:
                conv.weight[index] = 1
        lit = conv(torch.ones(1, 6, 4)).abs().sum((0, 2)).nonzero().flatten()
        assert lit.tolist() == [number]
    assert len(set(itertools.chain(*found))) == conv.weight.numel()


@pytest.mark.parametrize("options", [{}, {"unbiased": True}, {"eps_to": "std"}])
def test_a_constant_filter_without_eps_becomes_0_with_finite_gradients(options):
    weight = torch.ones(2, 3, 3).requires_grad_()
    result = nk.weights.standardize(weight, eps=0.0, **options)
    result.sum().backward()
    assert torch.equal(result, torch.zeros(2, 3, 3))
    assert torch.isfinite(weight.grad).all()
