"""Padded inputs: statistics over valid positions only, the others come out 0."""

import copy

import pytest
import torch
from torch.func import functional_call, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
import oracle
from cases import EVERY, TOLERANCE, groups, randn, statistics
from values import arrange, buffers_of, gradients, in_float64, parameters_for, scaled

pytestmark = pytest.mark.usefixtures("kernels")
TRACKED = [case for case in EVERY if case.tracks]
SHAPES = {"odd": (4, 6, 5, 6), "line": (5, 6, 9)}
ROWS = [(case, shape) for case in EVERY for shape in SHAPES if shape in case.shapes]
LENGTHS = torch.tensor([9, 4, 6, 0, 7])


def mask_for(shape, empty_example=False):
    """Half of the positions, at least four of each example; if asked, none of the last."""
    generator = torch.Generator().manual_seed(11)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) < 0.5
    mask.flatten(1)[:, :4] = True
    if empty_example:
        mask[-1] = False
    return mask


def as_valid(mask):
    return mask.unsqueeze(1)


def padded(shape, mask, dtype, seed=0):
    """Normal values with NaN, inf and large values where nothing is valid."""
    x = randn(*shape, dtype=dtype, seed=seed, mean=0.5)
    junk = torch.tensor([float("nan"), float("inf"), -1e6], dtype=dtype)
    junk = junk.repeat(x.numel() // 3 + 1)[: x.numel()].view(shape)
    return torch.where(as_valid(mask), x, junk)


def expected(case, layer, x, mask, buffers, alpha=None):
    """Oracle's output with 0 where nothing is valid, x as float64, and the parameters."""
    clean = torch.where(as_valid(mask), x.detach().double(), 0.0).requires_grad_()
    parameters = in_float64(layer)
    with oracle.masked(as_valid(mask)):
        if alpha is None:
            y = oracle.train(case.kind, clean, parameters, layer.eps, buffers, **groups(case))
        else:
            options = (parameters, layer.eps, buffers, alpha)
            y = oracle.evaluate(case.kind, clean, *options, **groups(case))
    return torch.where(as_valid(mask), y, 0.0), clean, parameters


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "shape"), ROWS, ids=str)
def test_training_is_over_valid_positions(case, shape, dtype, layout):
    shape = SHAPES[shape]
    mask = mask_for(shape, empty_example=case.kind != "ghost")
    layer = case.make(dtype=parameters_for(dtype))
    x = arrange(padded(shape, mask, dtype), layout).requires_grad_()
    grad = randn(*shape, dtype=dtype, seed=1)
    wanted, clean, parameters = expected(case, layer, x, mask, buffers_of(case, layer))
    y = layer(x, mask)
    assert y.dtype == dtype
    assert y[~as_valid(mask).expand_as(y)].eq(0).all()
    assert_close(y.double(), wanted.detach(), **scaled(TOLERANCE[dtype], wanted))
    found = gradients(y, x, layer, grad)
    theirs = torch.autograd.grad(wanted, [clean, *parameters.values()], grad.double())
    assert found[0][~as_valid(mask).expand_as(x)].eq(0).all()
    for ours, other in zip(found, theirs, strict=True):
        tolerance = scaled(TOLERANCE[dtype], other)
        tolerance["atol"] *= 4  # groups of four values
        assert_close(ours.double(), other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_buffers_follow_valid_positions(case, dtype):
    shape = SHAPES["odd"]
    layer = case.make(dtype=parameters_for(dtype))
    wanted = buffers_of(case, layer)
    for step in range(2):
        mask = mask_for(shape).roll(step, 0)
        x = padded(shape, mask, dtype, seed=step)
        layer(x, mask)
        clean = torch.where(as_valid(mask), x.double(), 0.0)
        with oracle.masked(as_valid(mask)):
            arguments = (clean, wanted, in_float64(layer), layer.eps)
            wanted = oracle.follow(case.kind, *arguments, **groups(case))
    for ours, theirs in zip(buffers_of(case, layer), wanted, strict=True):
        assert_close(ours, theirs, **TOLERANCE[parameters_for(dtype)])
    assert statistics(layer).num_batches_tracked == 2


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_evaluation_weighs_valid_positions(case, alpha):
    shape = SHAPES["odd"]
    layer = case.make(dtype=torch.float64)
    layer(randn(*shape))
    layer.eval().example_weight = alpha
    mask = mask_for(shape, empty_example=True)
    x = padded(shape, mask, torch.float64)
    wanted, _, _ = expected(case, layer, x, mask, buffers_of(case, layer), alpha)
    assert_close(layer(x, mask), wanted.detach(), **scaled(TOLERANCE[torch.float64], wanted))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_mask_that_leaves_everything_changes_nothing(case, training):
    layer = case.make(dtype=torch.float64)
    layer(randn(*SHAPES["odd"]))
    masked = copy.deepcopy(layer)
    x = randn(*SHAPES["odd"], seed=3)
    mask = torch.ones(4, 5, 6, dtype=torch.bool)
    assert_close(
        masked.train(training)(x, mask), layer.train(training)(x), **TOLERANCE[torch.float64]
    )
    for ours, theirs in zip(masked.buffers(), layer.buffers(), strict=True):
        assert_close(ours, theirs, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", [c for c in EVERY if "line" in c.shapes], ids=str)
def test_lengths_are_a_mask(case):
    layer = case.make(dtype=torch.float64)
    x = randn(*SHAPES["line"])
    mask = torch.arange(9) < LENGTHS[:, None]
    twin = copy.deepcopy(layer)
    for lengths in (LENGTHS, LENGTHS.int()):
        assert torch.equal(copy.deepcopy(twin)(x, lengths), copy.deepcopy(layer)(x, mask))


def test_lengths_count_along_the_last_axis():
    x = randn(2, 6, 3, 4)
    mask = (torch.arange(4) < torch.tensor([4, 2])[:, None])[:, None].expand(2, 3, 4)
    assert torch.equal(
        nk.BatchNorm(6)(x.float(), torch.tensor([4, 2])), nk.BatchNorm(6)(x.float(), mask)
    )


def test_examples_without_positions_have_a_mask_too():
    x, mask = randn(5, 6), torch.tensor([True, False, True, True, False])
    layer, kept = nk.BatchNorm(6, dtype=torch.float64), nk.BatchNorm(6, dtype=torch.float64)
    y = layer(x, mask)
    assert_close(y[mask], kept(x[mask]), **TOLERANCE[torch.float64])
    assert y[~mask].eq(0).all()
    assert_close(layer.running_var, kept.running_var)


@pytest.mark.parametrize("case", TRACKED, ids=str)
def test_a_batch_without_valid_values_keeps_the_statistics(case):
    layer = case.make()
    before = [buffer.clone() for buffer in layer.buffers()]
    y = layer(torch.full((2, 6, 3, 3), float("nan")), torch.zeros(2, 3, 3, dtype=torch.bool))
    assert y.eq(0).all()
    for buffer, old in zip(layer.buffers(), before, strict=True):
        assert torch.equal(buffer, old)
    assert statistics(layer).num_batches_tracked == 0


def test_a_frozen_batch_stage_takes_a_single_valid_value():
    layer = nk.BatchChannelNorm(6, num_groups=3)
    layer.batch.eval()
    mask = torch.tensor([[True, False, False]])
    assert layer(torch.randn(1, 6, 3), mask)[:, :, 0].isfinite().all()
    layer.train()
    with pytest.raises(nk.PartitionError, match="more than 1 valid value"):
        layer(torch.randn(1, 6, 3), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_gradients_of_16_bits_are_rounded_once(case, dtype):
    """Far from zero, where the parts of a gradient are large and cancel."""
    shape = SHAPES["odd"]
    mask, grad = mask_for(shape), randn(*shape, dtype=dtype, seed=1)
    layer = case.make(dtype=torch.float32)
    x = (randn(*shape) + 30).to(dtype).requires_grad_()
    wanted, clean, _ = expected(case, layer, x, mask, buffers_of(case, layer))
    (theirs,) = torch.autograd.grad(wanted, clean, grad.double())
    (found,) = torch.autograd.grad(layer(x, mask), x, grad)
    rounding = torch.finfo(dtype).eps / 2
    atol = 2e-5 * float(theirs.abs().max())
    assert_close(found.double(), theirs, rtol=rounding * 1.01, atol=atol)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("case", [c for c in EVERY if c.kind in ("bn", "bcn-micro")], ids=str)
def test_a_checkpointed_forward_with_a_mask_counts_once(case, use_reentrant):
    layer = case.make(dtype=torch.float64)
    plain = copy.deepcopy(layer)
    shape = SHAPES["odd"]
    mask = mask_for(shape)
    x = padded(shape, mask, torch.float64).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    checkpoint(layer, x, mask, use_reentrant=use_reentrant).square().sum().backward()
    plain(twin, mask).square().sum().backward()
    assert_close(x.grad, twin.grad)
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", [c for c in EVERY if "-" not in c.name], ids=str)
def test_transforms_take_masks(case):
    layer = case.make(dtype=torch.float64)
    shape = SHAPES["odd"]
    xs, masks = randn(3, *shape), torch.stack([mask_for(shape).roll(i, 0) for i in range(3)])
    found = vmap(lambda x, m: functional_call(layer, {}, (x, m)))(xs, masks)
    one_by_one = [copy.deepcopy(layer)(x, m) for x, m in zip(xs, masks, strict=True)]
    assert_close(found, torch.stack(one_by_one), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("kind", ["bn", "gn", "bcn"])
def test_a_mask_compiles(kind):
    torch.compiler.reset()
    case = next(c for c in EVERY if c.kind == kind)
    layer, shape = case.make(), SHAPES["odd"]
    mask = mask_for(shape)
    x = padded(shape, mask, torch.float32)
    twin = copy.deepcopy(layer)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask)
    assert_close(y, twin(x, mask), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", [c for c in EVERY if c.kind in ("bcn", "ibn")], ids=str)
def test_hooks_on_the_stages_see_the_mask(case):
    layer = case.make(dtype=torch.float64)
    watched = copy.deepcopy(layer)
    watched.batch.register_forward_hook(lambda *args: None)
    shape = SHAPES["odd"]
    mask = mask_for(shape, empty_example=True)
    x = padded(shape, mask, torch.float64)
    for training in (True, False):
        assert_close(watched.train(training)(x, mask), layer.train(training)(x, mask))
    for ours, theirs in zip(watched.buffers(), layer.buffers(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        ([True], nk.InputTypeError, "given a mask that is a list; it takes a tensor of booleans"),
        (torch.ones(4, 5), nk.InputTypeError, r"of torch.float32; .*valid \(mask.bool\(\)\)"),
        (torch.ones(4, 6, dtype=torch.bool), nk.InputError, r"shape \(4, 6\) .*booleans \(4, 5\)"),
        (torch.ones(4, 5, dtype=torch.long), nk.InputError, r"one for each position \(mask.bool"),
        (torch.tensor([5, 5, 5]), nk.InputError, r"numbers \(4,\), lengths along the last"),
        (torch.tensor([5, 5, 6, 1]), nk.InputError, "lengths from 1 to 6 .* lies from 0 to 5"),
        (torch.tensor([5, 5, -1, 1]), nk.InputError, "lengths from -1 to 5"),
        (torch.ones(4, 5, dtype=torch.bool, device="meta"), nk.InputError, r"mask.to\(x.device\)"),
    ],
    ids=str,
)
def test_other_masks_are_refused(mask, error, text):
    with pytest.raises(error, match=text):
        nk.BatchNorm(6)(torch.ones(4, 6, 5), mask)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_single_valid_value_is_refused_in_training(case):
    layer = case.make()
    mask = torch.zeros(4, 5, 6, dtype=torch.bool)
    mask[0, 0, 0] = True
    x = randn(4, 6, 5, 6, dtype=torch.float32)
    by_channel = case.kind in ("bn", "in", "ghost", "gnplus", "bcn", "ibn")
    finer = case.options.get("num_groups", 0) > 6
    if by_channel or finer or (case.kind == "sn" and case.name != "sn-two"):
        with pytest.raises(nk.PartitionError, match="more than 1 valid value per statistics group"):
            layer(x, mask)
    else:  # positions, groups of channels, or running estimates: there are other values
        assert layer(x, mask).isfinite().all()
    layer.eval()
    assert layer(x, mask).isfinite().all()
