"""Whole models: branches, activations, standardised weights, what the user's model keeps."""

import copy
import random

import pytest
import torch
from torch import nn

import normkit as nk
from convert.networks import timm
from fold.trained import model_of, randn, trained
from normkit.folding import api

X = randn(2, 6, 7, 5)


def exact(model, x=X):
    """Everything is folded, and the output is what it was."""
    before = model(x)
    done = nk.fold(model, x)
    assert done.left == ()
    torch.testing.assert_close(done.model(x), before, rtol=1e-11, atol=1e-11)
    return done


def test_activation_and_drop_stay_under_their_names():
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout)
    model = model_of(nn.Conv2d(6, 8, 3), norm)
    done = exact(model)
    kinds = {name: type(module) for name, module in done.model.named_modules() if "1." in name}
    assert kinds == {"1.drop": nn.Dropout, "1.act": nn.SiLU}
    assert done.folded[0].stays == "Dropout -> SiLU"


def test_hooks_on_an_activation_see_what_they_saw():
    model = model_of(nn.Conv2d(6, 8, 3), timm.layers.BatchNormAct2d(8))
    seen = []
    model[1].act.register_forward_hook(lambda module, args, output: seen.append(output))
    done = exact(model)
    seen.clear()
    torch.testing.assert_close(done.model(X), seen[0])


def test_our_norm_with_an_activation():
    model = model_of(nn.Conv2d(6, 8, 3), timm.layers.BatchNormAct2d(8))
    ours = nk.convert_norm(model, "bcn:2").model
    done = exact(trained(ours))
    assert [name for name, _ in done.model[1].named_children()] == ["channel", "act"]


def test_norms_in_a_row_go_one_after_the_other():
    done = exact(model_of(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nk.GhostBatchNorm(8), nn.ReLU()))
    assert [row.into for row in done.folded] == [("0",), ("0",)]
    done = exact(model_of(nn.BatchNorm2d(6), nn.Identity(), nk.BatchNorm(6), nn.Conv2d(6, 4, 2)))
    assert [(row.name, row.into) for row in done.folded] == [("0", ("3",)), ("2", ("3",))]


def test_one_layer_takes_norms_from_both_sides():
    done = exact(model_of(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 2, bias=False), nn.BatchNorm2d(4)))
    assert {row.into for row in done.folded} == {("1",)}


def test_into_all_layers_behind():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = (
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 4, 3),
                nn.Conv2d(6, 4, 3),
            )

        def forward(self, x):
            y = self.norm(x)
            return self.one(y).relu() - self.two(y)

    done = exact(trained(Branches().double()))
    assert done.folded[0].into == ("one", "two")


def test_a_residual_network_by_running_it():
    class Opaque(nn.Module):
        """torch.fx cannot follow it."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x):
            return x + self.norm(self.conv(x)) if float(x.sum()) > -1e9 else x

    assert exact(trained(Opaque().double())).folded[0].into == ("conv",)


def test_standardised_weights_are_baked():
    model = model_of(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    nk.standardize_weights_(model)
    done = exact(model)
    assert done.baked == ("0",)
    assert "weights baked: 0" in str(done)
    assert list(done.model.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert "0.parametrizations.weight.original" in model.state_dict()


def test_a_shared_module_goes_under_all_of_its_names():
    model = model_of(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
    model[0].also = model[1]
    done = exact(model)
    assert isinstance(done.model[0].also, nn.Identity)


def test_a_folded_model_is_left_by_another_fold():
    once = exact(model_of(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))).model
    twice = nk.fold(once, X)
    assert twice.folded == ()
    assert torch.equal(twice.model(X), once(X))


def test_other_sizes_work_as_well():
    model = model_of(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    done, x = exact(model), randn(5, 6, 11, 4)
    torch.testing.assert_close(done.model(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("given", [(X, 2.0), {"x": X, "times": 2.0}])
def test_several_arguments(given):
    class Scaled(nn.Sequential):
        def forward(self, x, times):
            return {"y": super().forward(x) * times, "size": x.shape[0]}

    model = trained(Scaled(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).double())
    done = nk.fold(model, given)
    assert len(done.folded) == 1
    assert done.difference < 1e-11


def test_outputs_that_cannot_be_compared():
    class Classes(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(1)

    done = nk.fold(trained(Classes(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).double()), X)
    assert done.difference is None
    said = "the outputs cannot be compared (nothing finite, or no numbers)"
    assert repr(done) == f"<Folding: folded 1 of 1 norms; {said}>"


@pytest.mark.parametrize("x", [torch.full((2, 6, 7, 7), float("nan")).double(), X[:0]])
def test_outputs_without_a_finite_value_are_not_said_to_agree(x):
    done = nk.fold(trained(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).double()), x)
    assert done.difference is None


def test_outputs_are_compared_where_they_are_finite():
    model = trained(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).double())
    x = X.clone()
    x[0, 0, 0, 0] = float("inf")
    assert 0 < nk.fold(model, x).difference < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float32, 1e-6)])
def test_dtype_layout_and_requires_grad_stay(dtype, limit):
    model = model_of(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)).to(dtype)
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    done = nk.fold(model, X.to(dtype))
    conv = done.model[0]
    assert conv.weight.dtype == conv.bias.dtype == dtype
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad
    assert done.difference < limit


def test_products_are_rounded_once():
    model = model_of(nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    half = copy.deepcopy(model).to(torch.bfloat16)
    wide = copy.deepcopy(half).double()
    expected = nk.fold(wide, X).model[1]
    folded = nk.fold(half, X.to(torch.bfloat16)).model[1]
    assert torch.equal(folded.weight, expected.weight.to(torch.bfloat16))
    assert torch.equal(folded.bias, expected.bias.to(torch.bfloat16))


@pytest.mark.parametrize("where", ["run", "trace", "make_plan", "_replaced", "difference", None])
def test_the_model_is_left_as_it_was_also_when_interrupted(monkeypatch, where):
    model = model_of(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.BatchNorm2d(8))
    nk.standardize_weights_(model)
    model.train()
    model[2].eval()
    model(X).sum().backward()
    before = state(model)

    def interrupt(*_args):
        torch.rand(1)
        raise KeyboardInterrupt

    if where is None:
        nk.fold(model, X)
    else:
        monkeypatch.setattr(api, where, interrupt)
        with pytest.raises(KeyboardInterrupt), torch.random.fork_rng():
            nk.fold(model, X)
    after = state(model)
    for key, value in before.items():
        same = torch.equal(after[key], value) if isinstance(value, torch.Tensor) else None
        assert same or after[key] == value, key


def state(model):
    """Everything of a model and the random numbers, as values."""
    hooks = {n: [*m._forward_hooks, *m._forward_pre_hooks] for n, m in model.named_modules()}
    return {
        **{f"value {n}": v.detach().clone() for n, v in model.state_dict().items()},
        **{f"grad {n}": p.grad.clone() for n, p in model.named_parameters()},
        "objects": [id(value) for value in (*model.parameters(), *model.buffers())],
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "hooks": hooks,
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }


def test_the_report_prints_as_a_table():
    model = model_of(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    lines = str(nk.fold(model, X)).splitlines()
    why = "its input comes from '2' (ReLU), and its result goes into the output"
    assert lines[0].startswith("folded 1 of 2 norms; the output differs by ")
    assert lines[1:] == [
        "  name  old             into  in its place",
        "  1     BatchNorm2d(8)  0     -",
        f"left: 3 (BatchNorm2d(8)): {why}",
    ]
