"""A weight for every layer."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.tune.gradient import gradient
from tune.nets import NUM_CLASSES, answers, data, plain_net, trained, tune_to
from tune.test_sweep import sweep_of


def mean_of_even(model, batches, weights):
    layers = [m for m in model.modules() if isinstance(m, nk.BatchNorm | nk.GroupNormPlus)]
    for layer, weight in zip(layers, weights, strict=True):
        layer.example_weight = weight
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), t, reduction="none") for x, t in batches]
    for layer in layers:
        layer.example_weight = 0.0
    return torch.cat(losses)[::2].mean().item()


def composite_net(norm):
    torch.manual_seed(0)
    return trained(nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nk.GroupNormPlus(6, num_groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, NUM_CLASSES),
    ))  # fmt: skip


@pytest.mark.parametrize("make", [plain_net, composite_net])
def test_the_gradient_is_that_of_finite_differences(make):
    model = make(nk.BatchNorm).double()
    batches = data(2, 5, dtype=torch.float64)  # an odd size: places are those in all the data
    sweep = sweep_of(model, batches)
    start = torch.tensor([0.2, 0.6], dtype=torch.float64)
    slope, cost = gradient(sweep, start)
    assert_close(cost, mean_of_even(model, batches, start.tolist()), rtol=1e-9, atol=1e-9)
    for i in range(2):
        ends = []
        for step in (1e-5, -1e-5):
            moved = start.clone()
            moved[i] += step
            ends.append(mean_of_even(model, batches, moved.tolist()))
        assert_close(slope[i].item(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    assert model[1].example_weight == 0


def test_every_layer_gets_its_weight():
    result = tune_to(answers((0.4, 0.1)), per_layer=True, refine=False)
    model = result.model
    assert result.significant
    assert result.alpha.keys() == {"1", "5"}
    assert abs(result.alpha["1"] - 0.4) < 0.03
    assert abs(result.alpha["5"] - 0.1) < 0.03
    assert model[1].example_weight == result.alpha["1"]
    assert model[5].example_weight == result.alpha["5"]
    assert result.gain.mean > result.shared_gain.mean
    assert "layer by layer, which gains" in result.reading
    assert f"; {result.shared:.3g} in all layers gains" in result.reading
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    other = answers((0.4, 0.1), num_batches=1)
    right, wrong = (
        result.gain_on(other, alpha={"1": a, "5": b}) for a, b in [(0.4, 0.1), (0.1, 0.4)]
    )
    assert right.mean > wrong.mean
    result.undo()
    assert isinstance(model[1], nn.BatchNorm2d)


def test_weights_stay_from_0_to_1_and_without_gain_all_are_0(monkeypatch):
    monkeypatch.setattr("normkit.tune.gradient.NUM_STEPS", 3)
    result = tune_to(answers((0.0, 0.0)), per_layer=True, grid=(0.1,))
    assert all(0 <= alpha <= 1 for alpha in result.best.values())
    assert not result.significant
    assert result.alpha == {"1": 0.0, "5": 0.0}
    assert result.model[1].example_weight == 0
