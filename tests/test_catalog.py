"""What the catalogue says of a method is what its layer does."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import normkit as nk
from cases import MAIN, randn
from normkit.catalog import CATALOG, FUNCTIONS
from normkit.spec import METHODS, NormSpec

NORMS = [(CATALOG[case.name.partition("-")[0]], case) for case in MAIN]
each_norm = pytest.mark.parametrize(("method", "case"), NORMS, ids=[str(case) for case in MAIN])


def test_it_has_every_norm_of_the_grammar_in_order_and_those_without_a_layer():
    assert list(CATALOG) == [*METHODS, *FUNCTIONS]
    assert {method.spec for method, _ in NORMS} == set(METHODS)
    assert all(key == method.spec for key, method in CATALOG.items())


@pytest.mark.parametrize("method", CATALOG.values(), ids=lambda method: method.spec)
def test_its_texts_are_there_and_its_example_is_a_spec_of_it(method):
    if method.spec in METHODS:
        spec = NormSpec.parse(method.example)
        assert spec.name == method.spec
        assert isinstance(spec.build(64), METHODS[method.spec].layer)
    elif method.example:
        assert NormSpec.parse(method.example).standardize_weights
    texts = method.facts() | {"name": method.name, "summary": method.summary}
    assert all(text and "\n" not in text and "`" not in text for text in texts.values())
    assert json.loads(json.dumps(method.as_dict()))["source"] == method.source


@each_norm
def test_the_batch_matters_where_it_says(method, case):
    """Another second example changes the first one's output, in training only."""
    x, other = randn(4, 6, 5, 7), randn(4, 6, 5, 7)
    other[1] = randn(6, 5, 7, seed=1)
    layer = case.make(dtype=torch.float64)
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    first = layer(x)[0]
    layer.load_state_dict(fresh)
    assert (layer(other)[0] != first).any() == method.batch_in_training
    layer.eval()
    assert torch.equal(layer(other)[0], layer(x)[0])
    assert ("running" in method.evaluation) == bool(method.buffers)


@each_norm
@pytest.mark.parametrize("kernels", ["reference", "best"])
def test_it_keeps_the_maps_that_it_says(method, case, kernels):
    x, kept = randn(4, 6, 12, 12, dtype=torch.float32).requires_grad_(), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        nk.use_kernels("reference") if kernels == "reference" else nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        case.make()(x)
    assert sum(tensor.numel() == x.numel() for tensor in kept.values()) == method.num_maps_kept
    assert (x.data_ptr() in kept) == method.kept.startswith("x")


@pytest.mark.parametrize("name", ["ws", "wn", "cwn"])
def test_weights_keep_the_raw_one_and_two_values_for_each_filter(name):
    weight, kept = torch.randn(8, 4, 3, 3, requires_grad=True), []
    gain = () if name == "ws" else (torch.ones(8),)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CATALOG[name].definition(weight, *gain)
    own = [t for t in kept if not any(t is g or torch.equal(t, g) for g in gain)]
    assert sum(tensor.numel() for tensor in own) == weight.numel() + 2 * 8


def test_what_a_weight_method_learns_is_what_it_attaches():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nk.BatchNorm(8))
    nk.standardize_weights_(model)
    assert {tuple(p.shape) for p in model[0].parameters()} == {(8,), (8, 4, 3, 3)}
    assert CATALOG["ws"].parameters == {} == CATALOG["ws"].buffers
    for attach in (nk.weights.weight_norm_, nk.weights.centered_weight_norm_):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nk.BatchNorm(8))
        attach(model)
        assert sorted(p.numel() for p in model[0].parameters()) == [8, 8 * 4 * 3 * 3]


@each_norm
def test_shapes_hold_for_another_size(method, case):
    layer = method.definition(64, **{k: v for k, v in case.options.items() if k != "num_groups"})
    groups = getattr(layer, "num_groups", None)
    sizes = {"C": 64, "C/2": 32, "G": groups}
    for shapes, tensors in (
        (method.parameters, layer.named_parameters()),
        (method.buffers, layer.named_buffers()),
    ):
        found = {name: tuple(tensor.shape) for name, tensor in tensors}
        assert found == {
            name: tuple(sizes.get(s) or int(s) for s in shape.strip("()").split(", ") if s)
            for name, shape in shapes.items()
        }
