"""``act(norm(x) + residual)`` of every layer against the float64 oracle, and its kept tensors."""

import copy
import pickle
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import normkit as nk
import oracle
from cases import CASES, COMPOSITES, EVERY, MAIN, SHAPES, TOLERANCE, Case, groups, randn
from normkit.errors import InputError, InputTypeError, OptionError, SpecError
from values import arrange, buffers_of, in_float64, parameters_for, scaled

ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "hardswish", "sigmoid", "tanh", "relu6")
AT_ONCE = tuple(c for c in EVERY if c.layer.takes_ending)
RELU_LIKE = ("relu", "leaky_relu")


@dataclass(frozen=True)
class Drawn:
    """A layer, how it ends, and the map that it is given."""

    case: Case
    shape: tuple
    activation: str | None
    slope: float
    has_residual: bool
    layouts: tuple
    dtype: torch.dtype
    alpha: float | None  # of an evaluation; None trains
    offset: float

    def __str__(self):
        size = "x".join(map(str, self.shape))
        mode = "train" if self.alpha is None else f"eval:{self.alpha:g}"
        added = "+residual" if self.has_residual else ""
        return f"{self.case}-{size}-{self.activation}{added}-{mode}-{self.dtype}-{self.layouts[0]}"


ROUNDED_ONCE = (torch.bfloat16, torch.float16)


def draw(seed):
    """One of the many combinations; the same for the same seed."""
    pick = random.Random(seed)
    case = pick.choice(CASES if pick.random() < 0.85 else EVERY)
    if seed >= OF_PARTITIONS:
        case = pick.choice((*COMPOSITES, next(c for c in CASES if c.kind == "pn")))
    shape = pick.choice([*(SHAPES[name] for name in case.shapes), *LARGE.get(case.name, [])])
    activation = pick.choice((*ACTIVATIONS, "relu", "leaky_relu", None))
    dtype = pick.choice((torch.float64, torch.float64, *TOLERANCE))
    if case not in AT_ONCE and dtype in ROUNDED_ONCE:
        dtype = (
            torch.float32
        )  # rounded before the activation too: signs differ from the definition's
    wide = dtype == torch.float64
    return Drawn(
        case, shape, activation,
        slope=pick.choice((0.01, 0.2, 0.0, -0.5)),
        has_residual=activation is None or pick.random() < 0.5,
        layouts=tuple(pick.choice(("contiguous", "channels_last", "sliced")) for _ in range(3)),
        dtype=dtype,
        alpha=pick.choice((0.0, 0.3, 1.0)) if case.tracks and pick.random() < 0.35 else None,
        offset=1e4 if wide and pick.random() < 0.3 else 0.5,
    )  # fmt: skip


OF_PARTITIONS = 400
"""Draws of which most are single partitions; those after are composites and positions."""
LARGE = {  # several vectors a row, groups that threads share, and whole blocks of columns
    "bn": [(3, 6, 17, 17), (2, 6, 150, 150), (40, 6, 9, 9)],
    "gn": [(3, 6, 40, 40), (2, 6, 130, 130)],
    "ln": [(2, 6, 60, 60)],
    "in": [(2, 6, 33, 35)],
    "bgn": [(4, 6, 70, 70), (20, 6, 5, 5)],
    "gbgn": [(5, 6, 40, 40)],
    "ghost": [(5, 6, 30, 30)],
    "pn": [(2, 6, 33, 35), (3, 6, 120, 120)],
    "bcn": [(3, 6, 40, 40)],
    "sn": [(3, 6, 17, 17)],
    "ibn": [(2, 6, 40, 40)],
}


@pytest.mark.parametrize("drawn", [draw(seed) for seed in range(OF_PARTITIONS + 150)], ids=str)
def test_values_and_gradients_match_the_composition(drawn, kernels):
    case, dtype, slope = drawn.case, drawn.dtype, drawn.slope
    if dtype in ROUNDED_ONCE and (kernels == "reference" or drawn.alpha == 0.3):
        dtype = torch.float32  # as in ``draw``: norm and activation one after the other
    layer = case.make(dtype=parameters_for(dtype))
    layer.activation, layer.negative_slope = drawn.activation, slope
    if drawn.alpha is not None:
        layer(randn(*drawn.shape, mean=drawn.offset, seed=9, dtype=dtype))
        layer.eval()
        layer.example_weight = drawn.alpha
    like_x, like_residual, like_grad = drawn.layouts
    x = arrange(randn(*drawn.shape, dtype=dtype, mean=drawn.offset), like_x).requires_grad_()
    residual = arrange(randn(*drawn.shape, dtype=dtype, seed=2), like_residual).requires_grad_()
    grad = arrange(randn(*drawn.shape, dtype=dtype, seed=1), like_grad)
    buffers, parameters = buffers_of(case, layer), in_float64(layer)
    y = layer(x, residual=residual) if drawn.has_residual else layer(x)
    assert y.dtype == dtype

    x64, residual64 = (t.detach().double().requires_grad_() for t in (x, residual))
    options = groups(case)
    if drawn.alpha is None:
        u = oracle.train(case.kind, x64, parameters, layer.eps, buffers, **options)
    else:
        given = (parameters, layer.eps, buffers, drawn.alpha)
        u = oracle.evaluate(case.kind, x64, *given, **options)
    added = residual64 if drawn.has_residual else None
    expected = oracle.ended(u, drawn.activation, slope, added)
    inputs = [x, *layer.parameters(), *([residual] if drawn.has_residual else [])]
    wanted = [x64, *parameters.values(), *([residual64] if drawn.has_residual else [])]
    found = torch.autograd.grad(y, inputs, grad)
    gradients = torch.autograd.grad(expected, wanted, grad.double())
    for ours, theirs in zip((y, *found), (expected, *gradients), strict=True):
        tolerance = scaled(TOLERANCE[dtype], theirs.detach())
        if drawn.alpha is not None:  # as in test_evaluation_matches_its_definition
            tolerance["atol"] *= 8 if case in CASES else 128
        tolerance["atol"] *= drawn.offset if drawn.offset > 1 and kernels == "reference" else 1
        if drawn.offset > 1 and case in COMPOSITES:  # a mixture's gradient multiplies means
            tolerance["atol"] *= 8
        assert_close(ours.detach().double(), theirs.detach(), **tolerance)


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_are_exact_far_out_too(activation, has_residual, dtype):
    values = torch.cat((torch.linspace(-30, 30, 6001), torch.tensor([-120.0, -89.0, 89.0, 120.0])))
    x = values.to(dtype).reshape(1, 1, -1).requires_grad_()
    layer = nk.BatchNorm(1, eps=0.0, affine=False, activation=activation, dtype=dtype).eval()
    added = torch.zeros_like(x) if has_residual else None
    y = layer(x, residual=added)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    x64 = x.detach().double().requires_grad_()
    reference = {"tanh": torch.tanh, "silu": nn.functional.silu, "gelu": nn.functional.gelu}
    expected = reference.get(activation, lambda u: oracle.ended(u, activation, 0.01))(x64)
    (wanted,) = torch.autograd.grad(expected, x64, torch.ones_like(expected))
    inside = ((x64.detach().abs() - 3).abs() > 1e-3) & ((x64.detach() - 6).abs() > 1e-3)  # corners
    error = 2e-14 if dtype == torch.float64 else 1e-6
    for ours, theirs in ((y, expected.detach()), (dx, wanted)):
        assert_close(ours.detach().double(), theirs, atol=error, rtol=error) if ours is y else None
        assert_close(ours.detach().double()[inside], theirs[inside], atol=error, rtol=error)


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_an_offset_costs_nothing(case, activation, offset):
    layer = case.make(activation=activation)
    shape = (4, 6, 5, 7) if case.kind != "bgn" else (4, 6, 3, 3)
    x = randn(*shape, mean=offset, dtype=torch.float32).requires_grad_()
    grad = randn(*shape, seed=1, dtype=torch.float32)
    parameters = in_float64(layer)
    y = layer(x)
    found = torch.autograd.grad(y, x, grad)[0]
    x64 = x.detach().double().requires_grad_()
    u = oracle.train(case.kind, x64, parameters, layer.eps, None, **groups(case))
    expected = oracle.ended(u, activation, 0.01)
    wanted = torch.autograd.grad(expected, x64, grad.double())[0]
    assert_close(y.detach().double(), expected.detach(), atol=2e-5, rtol=2e-5)
    assert_close(found.double(), wanted, **scaled({"atol": 2e-5, "rtol": 2e-5}, wanted))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
@pytest.mark.parametrize("name", ["bn", "gn", "ghost", "pn", "sn", "bcn", "ibn"])
def test_first_and_second_derivatives(name, activation, has_residual, training, kernels):
    case = next(c for c in EVERY if c.name == name)
    layer = case.make(activation=activation, dtype=torch.float64)
    layer(randn(3, 6, 3, mean=0.5)).sum()
    layer.train(training)
    names = [name for name, _ in layer.named_parameters()]
    maps = [
        randn(3, 6, 3, seed=seed).requires_grad_() for seed in ((0, 2) if has_residual else (0,))
    ]

    def call(x, *others):
        residual = others[0] if has_residual else None
        given = dict(zip(names, others[has_residual:], strict=True))
        return torch.func.functional_call(layer, given, (x,), {"residual": residual})

    inputs = (*maps, *(p.detach().requires_grad_() for p in layer.parameters()))
    assert gradcheck(call, inputs)  # along one drawn direction an error of 1 % may pass
    assert gradgradcheck(call, inputs, fast_mode=True)


MODES = [(c, m) for c in MAIN if c in AT_ONCE for m in (True, False) if m or c.tracks]


@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
@pytest.mark.parametrize(("case", "training"), MODES, ids=str)
def test_backward_keeps_the_input_and_one_map_that_is_there_anyway(
    case, activation, has_residual, training
):
    layer = case.make(activation=activation).train(training)
    x, residual = (randn(4, 6, 12, 12, seed=s, dtype=torch.float32) for s in (0, 1))
    x.requires_grad_()
    residual.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x, residual=residual) if has_residual else layer(x)
    maps = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
    places = {t.untyped_storage().data_ptr(): name for t, name in
              ((x, "x"), (residual, "residual"), (y, "y"))}  # fmt: skip
    beside = set()
    if has_residual and activation is not None:
        beside = {"y"} if activation in RELU_LIKE else {"residual"}
    assert {places.get(at, "a new map") for at in maps} == {"x"} | beside


def test_a_residual_is_let_go_where_only_the_result_is_kept():
    layer = nk.BatchNorm(6, activation="relu")
    x = randn(4, 6, 5, 7, dtype=torch.float32).requires_grad_()
    freed = []

    class Watched:
        def __del__(self):
            freed.append(True)

    residual = randn(4, 6, 5, 7, seed=1, dtype=torch.float32)
    residual.watched = Watched()
    y = layer(x, residual=residual)
    del residual
    assert freed
    y.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_an_infinite_gradient_does_not_pass_a_closed_relu(activation, kernels):
    x = randn(4, 6, 5, 7, dtype=torch.float32).requires_grad_()
    layer = nk.GroupNorm(6, num_groups=3, activation=activation)
    y = layer(x)
    closed = (y == 0).nonzero()
    grad = torch.zeros_like(y)
    if activation == "relu":
        grad[tuple(closed[0])] = torch.inf
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(dx, torch.zeros_like(dx))


def test_what_is_not_a_number_stays_so(kernels):
    x = randn(4, 6, 5, 7, dtype=torch.float32)
    x[0, 0, 0, 0] = torch.nan
    y = nk.InstanceNorm(6, activation="relu")(x)
    assert y[0, 0].isnan().all()
    assert y[1:].isfinite().all()


# --- the option and the argument ---------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_without_it_nothing_changes_and_state_dicts_are_the_same(case):
    plain, ending = case.make(), case.make(activation="gelu")
    assert "activation" not in repr(plain)
    assert "activation='gelu'" in repr(ending)
    assert plain.state_dict().keys() == ending.state_dict().keys()
    assert ending.activation == "gelu"
    for inner in ending.children():
        assert inner.activation is None
    built = eval(repr(ending), vars(nk))
    for other in (built, copy.deepcopy(ending), pickle.loads(pickle.dumps(ending))):
        other.load_state_dict(ending.state_dict())
        x = randn(3, 6, 5, 7, dtype=torch.float32)
        assert torch.equal(other(x), ending(x))


def test_specs_name_it():
    built = nk.build("gn:3:activation=leaky_relu:negative_slope=0.2", 6)
    assert (built.activation, built.negative_slope) == ("leaky_relu", 0.2)
    assert nk.build("bn:activation=none", 6).activation is None
    with pytest.raises(SpecError, match="must be one of: relu, leaky_relu, silu"):
        nk.build("bn:activation=swish", 6)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_functions_end_like_layers(case):
    function = FUNCTIONS.get(case.name)
    if function is None:
        return
    x, residual = (randn(4, 6, 5, 7, seed=s) for s in (0, 1))
    layer = case.layer(6, **case.options, activation="leaky_relu", negative_slope=0.3)
    ending = {"activation": "leaky_relu", "negative_slope": 0.3, "residual": residual}
    assert_close(function(x, **ending), layer.double()(x, residual=residual))


FUNCTIONS = {
    "bn": lambda x, **e: nk.functional.batch_norm(x, training=True, **e),
    "in": nk.functional.instance_norm,
    "ln": nk.functional.layer_norm,
    "gn": lambda x, **e: nk.functional.group_norm(x, 3, **e),
    "pn": nk.functional.positional_norm,
    "bgn": lambda x, **e: nk.functional.batch_group_norm(x, 2, training=True, **e),
    "ghost": lambda x, **e: nk.functional.ghost_batch_norm(x, 2, training=True, **e),
    "gbgn": lambda x, **e: nk.functional.general_batch_group_norm(x, 3, 2, training=True, **e),
    "gw": lambda x, **e: nk.functional.group_whitening(x, 3, **e),
}


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_a_mask_leaves_0_where_nothing_is_valid(case, kernels):
    layer = case.make(activation="sigmoid", dtype=torch.float64)
    plain = case.make(dtype=torch.float64)
    x, residual = (randn(4, 6, 9, seed=s) for s in (0, 1))
    mask = torch.arange(9) < torch.tensor([[9], [6], [7], [5]])
    residual[~mask[:, None].expand_as(x)] = torch.nan
    y = layer(x, mask, residual=residual)
    expected = torch.sigmoid(plain(x, mask) + residual)
    inside = mask[:, None].expand_as(x)
    assert torch.equal(y[~inside], torch.zeros_like(y[~inside]))
    assert_close(y[inside], expected[inside])


def test_an_empty_batch_ends_too():
    layer = nk.BatchNorm(6, activation="relu")
    x = torch.zeros(0, 6, 5, requires_grad=True)
    layer(x, residual=torch.zeros(0, 6, 5)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(6))


def test_buffers_move_as_without():
    x = randn(4, 6, 5, 7, dtype=torch.float32)
    plain, ending = nk.BatchNorm(6), nk.BatchNorm(6, activation="silu")
    plain(x)
    ending(x, residual=x)
    for ours, theirs in zip(plain.buffers(), ending.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    known = f"{', '.join(map(repr, ACTIVATIONS))}; None applies no activation"
    with pytest.raises(
        OptionError, match=f"activation='swish' was given; these are known: {known}"
    ):
        nk.BatchNorm(6, activation="swish")
    layer = nk.BatchNorm(6)
    with pytest.raises(OptionError, match="activation=<built-in"):
        layer.activation = torch.relu
    assert layer.activation is None
    with pytest.raises(OptionError, match="negative_slope='steep' was given; it must be a number"):
        nk.BatchNorm(6, activation="leaky_relu", negative_slope="steep")


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_a_residual_that_does_not_fit_is_refused(case):
    layer, x = case.make(), randn(3, 6, 5, 7, dtype=torch.float32)
    with pytest.raises(
        InputError, match=r"shape \(3, 6, 1, 1\) for an input of shape \(3, 6, 5, 7\)"
    ):
        layer(x, residual=x[..., :1, :1])
    with pytest.raises(
        InputTypeError, match=r"residual of torch.float64 for an input of torch.float32"
    ):
        layer(x, residual=x.double())
    with pytest.raises(InputError, match=r"residual on meta and an input on cpu"):
        layer(x, residual=x.to("meta"))
    with pytest.raises(InputTypeError, match="residual that is a float"):
        layer(x, residual=1.0)
    with pytest.raises(InputError, match="not broadcast"):
        nk.functional.batch_norm(x, training=True, residual=x[:1])


# --- under torch's transforms --------------------------------------------------------------------


class Summed(nn.Module):
    """A layer that is given two maps by position, as exporters want it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, residual):
        return self.layer(x, residual=residual)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", ["bn", "gn", "bgn", "pn", "bcn"])
def test_a_compiled_layer_ends_alike(name, activation, training):
    torch.compiler.reset()
    case = next(c for c in MAIN if c.name == name)
    layer = case.make(activation=activation, dtype=torch.float64)
    layer(randn(4, 6, 5, 3))
    layer.train(training)
    other = copy.deepcopy(layer)
    compiled = torch.compile(Summed(layer), fullgraph=True)
    inputs = [randn(4, 6, 5, 3, seed=s).requires_grad_() for s in (0, 1)]
    grad = randn(4, 6, 5, 3, seed=2)
    y, expected = compiled(*inputs), Summed(other)(*inputs)
    assert_close(y, expected)
    assert_close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))
    for ours, theirs in zip(layer.buffers(), other.buffers(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["bn", "gn", "sn"])
def test_transforms_look_through_it(name):
    case = next(c for c in MAIN if c.name == name)
    layer = case.make(activation="silu", dtype=torch.float64)
    layer(randn(4, 6, 5, 3))
    layer.eval()
    many, added = randn(2, 4, 6, 5, 3, seed=4), randn(2, 4, 6, 5, 3, seed=5)
    one_by_one = [layer(x, residual=r) for x, r in zip(many, added, strict=True)]
    found = torch.func.vmap(lambda x, r: layer(x, residual=r))(many, added)
    assert_close(found, torch.stack(one_by_one))
    tangent = randn(4, 6, 5, 3, seed=6)
    call = (lambda x, r: layer(x, residual=r), (many[0], added[0]))
    _, along = torch.func.jvp(*call, (tangent, tangent))
    (dx, dr) = torch.autograd.functional.vjp(*call, tangent)[1]
    assert_close((along * tangent).sum(), ((dx + dr) * tangent).sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")  # as in test_transforms
@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_exports(activation, tmp_path):
    import onnxruntime  # slow

    layer = nk.BatchNorm(6, activation=activation).eval()
    x, residual = (randn(2, 6, 5, 3, seed=s, dtype=torch.float32) for s in (0, 1))
    expected = layer(x, residual=residual).detach()
    model = Summed(layer).eval()
    exported = torch.export.export(model, (x, residual))
    assert_close(exported.module()(x, residual).detach(), expected)
    path = tmp_path / "layer.onnx"
    torch.onnx.export(model, (x, residual), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy(), residual.numpy()), strict=True)))
    assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


def test_fx_records_one_node():
    layer = nk.BatchNorm(6, activation="relu")
    graph = torch.fx.symbolic_trace(Summed(layer)).graph
    (call,) = [node for node in graph.nodes if node.op == "call_module"]
    assert call.target == "layer"
    assert list(call.kwargs) == ["residual"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_autocast_changes_nothing(case, dtype):
    """The result has the dtype of the input, and is computed as without autocast."""
    layer, other = (case.make(activation="relu") for _ in range(2))
    inputs = [randn(4, 6, 5, 3, seed=s, dtype=dtype).requires_grad_() for s in (0, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs[0], residual=inputs[1])
    expected = other(inputs[0], residual=inputs[1])
    assert y.dtype == dtype
    assert_close(y, expected)
    found, wanted = (torch.autograd.grad(out.float().sum(), inputs) for out in (y, expected))
    assert_close(found, wanted)


def test_frozen_statistics_stay():
    model = nn.Sequential(nk.BatchNorm(6, activation="relu"))
    nk.freeze_statistics(model)
    before = copy.deepcopy(model.state_dict())
    x = randn(4, 6, 5, 3, dtype=torch.float32, mean=2.0)
    assert torch.equal(model.train()(x), torch.relu(x / (1 + 1e-5) ** 0.5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_statistics_over_processes_end_too(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        layers = [nk.BatchNorm(6, activation="silu", process_group=p) for p in (None, "world")]
        inputs = [randn(4, 6, 5, 3, seed=s).requires_grad_() for s in (0, 1)]
        results = [layer.double()(inputs[0], residual=inputs[1]) for layer in layers]
        gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
    finally:
        torch.distributed.destroy_process_group()
    assert_close(results[0], results[1])
    assert_close(gradients[0], gradients[1])
    assert_close(layers[0].running_var, layers[1].running_var)
