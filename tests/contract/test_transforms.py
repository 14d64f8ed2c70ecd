"""Every layer under ``torch.func``, ``torch.compile``, ``torch.export`` and ONNX."""

import copy
import pickle

import onnxruntime
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import normkit as nk
from cases import CASES, COMPOSITES, EVERY, MAIN, TOLERANCE, randn
from convert.networks import timm

X = randn(4, 6, 5, 3, mean=1.0)
CLOSE = TOLERANCE[torch.float64]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def stepped(case, dtype=torch.float64):
    layer = case.make(dtype=dtype)
    layer(X.to(dtype))
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_vmap_is_a_loop(case, training):
    layer = stepped(case).train(training)
    before = copy.deepcopy(layer.state_dict())
    many = randn(3, *X.shape, seed=4)
    assert_close(vmap(layer)(many), torch.stack([copy.deepcopy(layer)(x) for x in many]), **CLOSE)
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_per_example_gradients(case, training):
    """The gradient of each batch's loss by the parameters, for three batches at once."""
    layer = stepped(case).train(training)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    many = randn(3, *X.shape, seed=4)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).pow(3).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, many)
    for index, x in enumerate(many):
        one = copy.deepcopy(layer)
        one(x).pow(3).sum().backward()
        for name, p in one.named_parameters():
            assert_close(found[name][index], p.grad, **CLOSE)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_hessian_vector_products(case):
    layer = stepped(case)
    x, v = randn(3, 6, 3), randn(3, 6, 3, seed=2)
    full = hessian(lambda x: layer(x).pow(3).sum())(x).reshape(x.numel(), -1)
    expected = (full @ v.flatten()).reshape(x.shape)
    _, forward_over_reverse = jvp(grad(lambda x: layer(x).pow(3).sum()), (x,), (v,))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
    (reverse_over_reverse,) = torch.autograd.grad(first, leaf, v)
    assert_close(forward_over_reverse, expected, **CLOSE)
    assert_close(reverse_over_reverse, expected, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_forward_mode_is_the_transpose_of_reverse_mode(case, training):
    layer = stepped(case).train(training)
    v, w = randn(*X.shape, seed=2), randn(*X.shape, seed=3)
    with forward_ad.dual_level():
        y = copy.deepcopy(layer)(forward_ad.make_dual(X, v))
        tangent = forward_ad.unpack_dual(y).tangent
    _, pull = vjp(layer, X)
    assert_close((tangent * w).sum(), (pull(w)[0] * v).sum(), **CLOSE)


CUTS = tuple(case for case in CASES if case.options.get("num_groups") == 9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [*MAIN, *CUTS], ids=str)
def test_compile_without_graph_breaks(case, training):
    layer = stepped(case).train(training)
    same = copy.deepcopy(layer)
    compiled = torch.compile(same, fullgraph=True, backend="aot_eager", dynamic=True)
    shapes = [(4, 6, 5, 3), (6, 6, 5, 3)] if case in CUTS else [(4, 6, 5, 3), (6, 6, 7, 9)]
    for step, shape in enumerate(shapes):
        x = randn(*shape, seed=step).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        y, y2 = layer(x), compiled(x2)
        y.pow(3).sum().backward()
        y2.pow(3).sum().backward()
        assert_close(y2, y, **CLOSE)
        assert_close(x2.grad, x.grad, **CLOSE)
    for name, value in layer.state_dict().items():
        assert_close(same.state_dict()[name], value, **CLOSE)


@pytest.mark.parametrize("name", ["gnplus", "bcn-micro", "sn", "ibn"])
def test_the_plain_formula_of_a_composite_compiles(name):
    (case,) = (case for case in COMPOSITES if case.name == name)
    layer = stepped(case)
    same, x = copy.deepcopy(layer), X.clone().requires_grad_()
    with nk.use_kernels("reference"):
        y, y2 = layer(x), torch.compile(same, fullgraph=True, backend="aot_eager")(x)
        assert_close(y2, y, **CLOSE)
        found, expected = (torch.autograd.grad(out.pow(3).sum(), x)[0] for out in (y2, y))
    assert_close(found, expected, **CLOSE)
    for ours, theirs in zip(same.buffers(), layer.buffers(), strict=True):
        assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["bn", "ghost-rest", "gbgn"])
def test_compiled_once_for_every_batch_size(name, kernels):
    """With whole runs of examples and with a smaller last one."""
    (case,) = (case for case in CASES if case.name == name)
    layer = stepped(case)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    with nk.use_kernels(kernels):
        for size in (4, 5, 6, 7, 9, 10):
            x = randn(size, 6, 4, seed=size)
            assert_close(compiled(x), layer(x), **CLOSE)


@pytest.mark.slow
def test_inductor_agrees():
    network = nn.Sequential(*(stepped(case, torch.float32) for case in MAIN))
    same = copy.deepcopy(network)
    x = X.float()
    y = torch.compile(same, fullgraph=True)(x)
    assert_close(y, network(x), atol=1e-4, rtol=1e-4)
    for name, value in network.state_dict().items():
        assert_close(same.state_dict()[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_export_with_any_batch_size(case):
    layer = stepped(case).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (X,), dynamic_shapes=({0: batch},), strict=True)
    for size in (2, 7):
        x = randn(size, *X.shape[1:], seed=size)
        assert_close(program.module()(x), layer(x), **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")  # theirs, at import
@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")  # torch.export copies its own specs
@pytest.mark.parametrize("case", [*MAIN, *CUTS], ids=str)  # export itself is tested for every one
def test_onnxruntime_agrees(case, tmp_path):
    layer = stepped(case, torch.float32).eval()
    x, path = X.float(), str(tmp_path / "layer.onnx")
    torch.onnx.export(layer, (x,), path, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), layer(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_averaged_models_average_statistics_too(case):
    layer, states = case.make(dtype=torch.float64), []
    average = AveragedModel(layer, use_buffers=True)
    for step in range(3):
        layer(X * (step + 1))
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(layer.parameters()) + step, layer.parameters()
        )
        average.update_parameters(layer)
        states.append(copy.deepcopy(layer.state_dict()))
    for name, value in average.module.state_dict().items():
        if value.is_floating_point() and "example_weight" not in name:
            assert_close(value, sum(state[name] for state in states) / 3, **CLOSE)
    assert average.eval()(X).isfinite().all()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_functional_call_moves_the_buffers_that_it_is_given(case):
    layer, other = stepped(case), stepped(case)
    before = copy.deepcopy(layer.state_dict())
    other(X + 1)
    given = {n: t.detach().clone() for n, t in [*layer.named_parameters(), *layer.named_buffers()]}
    y = functional_call(layer, given, (X + 1,))
    assert_close(y, stepped(case)(X + 1), **CLOSE)
    for name, value in other.named_buffers():
        assert_close(given[name], value, **CLOSE)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_conversion_adds_to_a_layer_is_exported_with_it():
    """An activation, and channels in the last axis."""
    old = nn.Sequential(timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU), nn.LayerNorm(3)).double()
    network = nk.convert_norm(old, {"0": "bgn:2", "1": "pn"}).model.eval()
    program = torch.export.export(network, (X,), strict=True)
    assert_close(program.module()(X), network(X), **CLOSE)
    assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(X), network(X))


class Decorated(nk.BatchNorm):
    """A user's subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x) + 1


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_fx_records_a_layer_as_one_leaf(case):
    net = nn.Sequential(nn.Conv1d(3, 6, 1), case.make(), nn.ReLU())
    graph = torch.fx.symbolic_trace(net)
    leaves = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert leaves == ["0", "1", "2"]
    x = randn(4, 3, 9, dtype=torch.float32)
    twin = copy.deepcopy(net)
    for training in (True, False):
        assert torch.equal(graph.train(training)(x), twin.train(training)(x))


def test_fx_records_a_subclass_with_its_own_forward_once():
    net = nn.Sequential(nn.Conv1d(3, 6, 1), Decorated(6))
    graph = torch.fx.symbolic_trace(net).eval()
    x = randn(4, 3, 9, dtype=torch.float32)
    assert torch.equal(graph(x), net.eval()(x))
    assert torch.equal(copy.deepcopy(graph)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(graph))(x), net(x))
    assert graph.train().get_submodule("1").training


def test_fx_cannot_look_inside_a_layer():
    with pytest.raises(nk.TraceError, match=r"trace BatchNorm itself, .*nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(nk.BatchNorm(6))


@pytest.mark.filterwarnings("ignore")  # torch.jit itself is deprecated
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_the_old_exporter_to_onnx_agrees(case, tmp_path):
    """The older exporter without ``dynamo=True``, which traces."""
    net, x = nn.Sequential(nn.Conv1d(3, 6, 1), case.make()), randn(4, 3, 9, dtype=torch.float32)
    net(x)
    net.eval()
    path = tmp_path / "old.onnx"
    torch.onnx.export(net, (x,), path, dynamo=False, opset_version=18)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(y), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_tensorboard_draws_the_graph(case, tmp_path, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # read once a process: others look at stderr
    pytest.importorskip("tensorboard", reason="not beside the oldest torch")
    from torch.utils.tensorboard import SummaryWriter  # it may not be there

    net, x = nn.Sequential(nn.Conv1d(3, 6, 1), case.make()), randn(4, 3, 9, dtype=torch.float32)
    net(x)
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(net.eval(), x)
    (written,) = tmp_path.iterdir()
    assert type(net[1]).__name__.encode() in written.read_bytes()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_operations_of_a_network_are_counted(case, training):
    net = nn.Sequential(nn.Conv1d(3, 6, 1), case.make()).train(training)
    with FlopCounterMode(display=False) as counter:
        net(randn(4, 3, 9, dtype=torch.float32).requires_grad_()).sum().backward()
    convolution = 2 * 4 * 9 * 3 * 6  # and as many for each of two gradients
    assert counter.get_flop_counts()["Global"][torch.ops.aten.convolution] == convolution
    assert counter.get_total_flops() >= 3 * convolution


@pytest.mark.filterwarnings("ignore")  # torch.jit itself is deprecated
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_jit_cannot_script_a_layer_and_says_what_to_use(case):
    for model in (case.make(), nn.Sequential(nn.ReLU(), case.make())):
        with pytest.raises(
            nk.OptionError, match=r"given to torch\.jit\.script, .*use torch\.export"
        ):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore")  # torch.jit itself is deprecated, and notes what it fixes
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_jit_traces_the_plain_formula(case):
    net = nn.Sequential(nn.Conv1d(3, 6, 1), case.make())
    net(randn(4, 3, 9, dtype=torch.float32))
    net.eval()
    traced = torch.jit.trace(net, randn(4, 3, 9, dtype=torch.float32))
    x = randn(7, 3, 9, seed=1, dtype=torch.float32)
    assert_close(traced(x), net(x), **TOLERANCE[torch.float32])
