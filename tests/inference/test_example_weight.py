"""Example weights of a whole model."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()
import torchvision  # noqa: E402 - its operators must be registered first


def test_every_layer_with_running_statistics_is_set():
    model = nn.Sequential(
        nk.BatchNorm(6), nk.GroupNorm(6, num_groups=3), nk.BatchChannelNorm(6, num_groups=3)
    )
    assert nk.set_example_weight(model, 0.25) == ("0", "2.batch")
    assert model[0].example_weight == model[2].example_weight == 0.25
    assert model[1].example_weight == 1


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(nk.OptionError, match="Linear has no layer of normkit with running"):
        nk.set_example_weight(nn.Linear(2, 2), 0.5)


def test_an_alpha_that_is_no_share_changes_nothing():
    model = nn.Sequential(nk.BatchNorm(6))
    with pytest.raises(nk.OptionError, match="lies from 0 to 1"):
        nk.set_example_weight(model, 1.5)
    assert model[0].example_weight == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_resnet_has_the_papers_formula_in_every_layer(alpha):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=nk.BatchNorm, num_classes=4).double()
    model(torch.randn(4, 3, 64, 64).double())
    model.eval()
    nk.set_example_weight(model, alpha)
    seen = []
    for layer in model.modules():
        if isinstance(layer, nk.BatchNorm):
            layer.register_forward_hook(
                lambda m, given, y: seen.append((m, given[0].clone(), y.clone()))  # ReLU in place
            )
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64).double())
    assert len(seen) == 20
    for layer, x, y in seen:
        own = x.mean(dim=(2, 3), keepdim=True)
        square = x.square().mean(dim=(2, 3), keepdim=True)
        m, v, w, b = (
            t.reshape(1, -1, 1, 1)
            for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        mean = alpha * own + (1 - alpha) * m
        var = alpha * square + (1 - alpha) * (v + m**2) - mean**2
        assert_close(y, (x - mean) / (var + layer.eps).sqrt() * w + b, atol=1e-8, rtol=1e-8)


def test_a_variance_is_never_negative_far_from_zero():
    """Mean 1e3, standard deviation 0.1: in float32, E[x^2] - mean^2 has no correct digit."""
    layer = nk.BatchNorm(6)
    x = torch.randn(64, 6, 5, 5) * 0.1 + 1e3
    for _ in range(100):
        layer(x)
    layer.eval()
    nk.set_example_weight(layer, 0.5)
    y = layer(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, weighed(x, layer, 0.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_an_offset_costs_no_digits_at_evaluation(alpha, kernels):
    x = torch.randn(16, 6, 7, 7) + 1e4
    layer = nk.BatchNorm(6, momentum=1.0)
    with nk.use_kernels(kernels):
        layer(x)
        nk.set_example_weight(layer.eval(), alpha)
        y = layer(x)
    limit = 1e-5 if kernels == "cpu" else 2e-2  # plain torch sums in float32
    torch.testing.assert_close(y, weighed(x, layer, alpha), atol=limit, rtol=limit)


def weighed(x, layer, alpha):
    """The paper's formula in float64."""
    x = x.double()
    mean, var = (b.double().reshape(1, -1, 1, 1) for b in (layer.running_mean, layer.running_var))
    own = x.mean(dim=(2, 3), keepdim=True)
    square = alpha * x.square().mean(dim=(2, 3), keepdim=True) + (1 - alpha) * (var + mean.square())
    mixed = alpha * own + (1 - alpha) * mean
    return ((x - mixed) / (square - mixed.square() + layer.eps).sqrt()).float()


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_a_weight_of_0_costs_nothing(kernels, monkeypatch):
    """Evaluation then measures nothing: neither a moment of the input nor a mixture."""
    layer, x = nk.BatchNorm(6).eval(), torch.randn(4, 6, 5)

    def measured(*_, **__):
        raise AssertionError("the input's moments were taken")

    monkeypatch.setattr("normkit.core.groups.normalize", measured)
    with nk.use_kernels(kernels):
        layer(x)
        layer.example_weight = 0.5
        with pytest.raises(AssertionError, match="moments were taken"):
            layer(x)
