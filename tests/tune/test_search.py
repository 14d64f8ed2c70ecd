"""What is chosen, how sure it is, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.errors import DataError, OptionError
from normkit.layers.base import TrackingLayer
from normkit.tune.gain import paired_gain
from normkit.tune.grids import GRID
from normkit.tune.metrics import KNOWN
from normkit.tune.search import golden_section
from tune.nets import answers, data, distance, plain_net, tune_to


def test_the_curve_is_that_of_as_many_plain_evaluations():
    batches, model = data(3, 8), plain_net()
    result = nk.tune_example_weight(model, batches, refine=False)
    assert [point.alpha for point in result.curve] == list(GRID)
    assert GRID[1] == pytest.approx(1 - GRID[-2]) == 0.02  # as fine at one end as at the other
    assert result.how == "from the first norm on"
    for point in result.curve:
        nk.set_example_weight(model, point.alpha)
        with torch.no_grad():
            losses = [
                nn.functional.cross_entropy(model(x), t, reduction="none") for x, t in batches
            ]
        assert_close(point.mean, torch.cat(losses).double().mean().item(), rtol=1e-6, atol=1e-6)
        assert point.num_examples == 24


def test_data_that_a_weight_suits_gets_it():
    result = tune_to(answers((0.33, 0.33)))
    model = result.model
    assert result.significant
    assert abs(result.alpha - 0.33) < 0.006
    assert result.alpha == result.best == result.shared
    assert result.gain.low > 0
    assert result.gain.num_examples == 16
    layers = [layer for layer in model.modules() if isinstance(layer, TrackingLayer)]
    assert [layer.example_weight for layer in layers] == [result.alpha] * 2
    nk.set_example_weight(model, 0.0)
    assert set(model.state_dict()) == set(plain_net().state_dict())
    assert str(result).splitlines()[0] == (
        "example weight of 2 layers, tuned for distance (smaller is better) on 32 examples"
    )
    assert result.reading.startswith(f"alpha is set to {result.alpha:.3g}, which gains +")
    assert "on 16 examples that had no part in choosing" in result.reading


def test_the_gain_is_of_examples_that_had_no_part_in_choosing():
    batches = answers((0.3, 0.3))
    result = tune_to(batches, grid=(0.2, 0.6), refine=False)
    found = []
    for alpha in (0.0, result.best):
        nk.set_example_weight(result.model, alpha)
        with torch.no_grad():
            found.append(torch.cat([distance(result.model(x), (x, y)) for x, y in batches]))
    gains = (found[0] - found[1]).double()
    assert_close(result.gain.mean, gains[1::2].mean().item(), rtol=1e-5, atol=1e-6)
    half = 1.959964 * gains[1::2].std().item() / 4
    assert_close(result.gain.high - result.gain.mean, half, rtol=1e-5, atol=1e-6)
    judged = [(x, y.clone()) for x, y in batches]
    for _, y in judged:
        y[1::2] = y[1::2].flip(0)  # what the judges see does not choose
    again = tune_to(judged, grid=(0.2, 0.6), refine=False)
    assert again.best == result.best
    assert again.gain.mean != result.gain.mean
    for (_, y), (_, other) in zip(judged, answers((0.6, 0.6)), strict=True):
        y[::2] = other[::2]
    assert (result.best, tune_to(judged, grid=(0.2, 0.6), refine=False).best) == (0.2, 0.6)


def test_noise_is_not_taken_for_gain():
    """Scores that do not depend on the weight but for noise: about 1 in 40 may seem a gain."""
    num_gains = num_better = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)

        def noise(output, batch, generator=generator):
            return torch.randn(len(output), generator=generator)

        model = nn.Sequential(nk.BatchNorm(2))
        batches = [(torch.randn(50, 2, 2, 2), None)]
        result = nk.tune_example_weight(model, batches, metric=noise, refine=False)
        num_better += result.curve[0].gain < max(point.gain for point in result.curve)
        num_gains += result.significant
        assert result.alpha == (result.best if result.significant else 0)
        assert model[0].example_weight == result.alpha
    assert num_better >= 30
    assert num_gains <= 4


def test_a_weight_that_does_not_help_stays_zero():
    result = tune_to(answers((0.0, 0.0)))
    assert result.alpha == result.best == 0
    assert not result.significant
    assert result.reading == (
        "alpha stays 0: no other weight was better on the examples that choose"
    )
    assert all(isinstance(result.model[i], nk.BatchNorm) for i in (1, 5))


def test_a_gain_that_may_be_noise_or_is_a_loss_is_said_to_be_one():
    batches = answers((0.3, 0.3))
    usual = [y for _, y in answers((0.0, 0.0))]
    for (_, y), other in zip(batches, usual, strict=True):
        y[1::4] = other[1::4]  # half of those that judge would rather have 0
    noise = tune_to(batches, grid=(0.3,), refine=False)
    assert (noise.alpha, noise.best) == (0, 0.3)
    assert noise.reading.startswith("alpha stays 0: 0.3 gains ")
    assert noise.reading.endswith(", which may be noise")
    for (_, y), other in zip(batches, usual, strict=True):
        y[1::2] = other[1::2]
    loss = tune_to(batches, grid=(0.3,), refine=False)
    assert loss.alpha == 0
    assert loss.gain.high < 0
    assert loss.reading.endswith(", which is a loss")


def test_golden_section_finds_the_top():
    asked = {}

    def value(x):
        asked[x] = -((x - 0.137) ** 2)
        return asked[x]

    golden_section(value, 0.1, 0.3)
    assert abs(max(asked, key=asked.get) - 0.137) < 0.006
    assert len(asked) < 10


def test_refining_looks_between_the_neighbours_of_the_best():
    batches = answers((0.4, 0.4), num_batches=2)
    result = tune_to(batches, grid=(0.1, 0.3, 0.9))
    tried = [point.alpha for point in result.curve]
    added = [alpha for alpha in tried if alpha not in (0, 0.1, 0.3, 0.9)]
    assert all(0.1 < alpha < 0.9 for alpha in added)
    assert abs(result.best - 0.4) < 0.006
    rough = tune_to(batches, grid=(0.1, 0.3, 0.9), refine=False)
    assert [point.alpha for point in rough.curve] == [0, 0.1, 0.3, 0.9]


def tracked_net(weight=1.0):
    """Group norms that track statistics, whose own weight is 1."""
    model = plain_net(lambda c: nk.GroupNorm(c, num_groups=2, track_running_stats=True))
    for layer in (model[1], model[5]):
        layer.example_weight = weight
    return model


def suited(weight):
    """Data that tracked group norms with this weight suit."""
    model = tracked_net(weight)
    with torch.no_grad():
        return [(x, model(x)) for x, _ in data(4, 8)]


@pytest.mark.parametrize("per_layer", [False, True])
def test_layers_keep_their_own_weight_where_no_other_is_better(monkeypatch, per_layer):
    monkeypatch.setattr("normkit.tune.gradient.NUM_STEPS", 1)
    model, batches = tracked_net(), suited(1.0)
    before = model(batches[0][0])
    options = {"metric": distance, "larger_is_better": False, "per_layer": per_layer}
    result = nk.tune_example_weight(model, batches, **options)
    assert [model[i].example_weight for i in (1, 5)] == [1.0, 1.0]
    assert result.before == 1.0
    assert result.alpha == ({"1": 1.0, "5": 1.0} if per_layer else 1.0)
    assert result.reading == (
        "alpha stays 1: no other weight was better on the examples that choose"
    )
    assert torch.equal(model(batches[0][0]), before)
    assert result.gain_on(batches).mean == 0
    losing = {point.alpha: point.gain for point in result.curve}
    assert losing[1.0] == 0
    assert losing[0.0] < 0


def test_weights_near_one_are_found_and_gains_are_against_the_layers_own():
    model, batches = tracked_net(), suited(0.93)
    found = []
    for weight in (1.0, 0.93):
        with torch.no_grad():
            other = tracked_net(weight)
            found.append(torch.cat([distance(other(x), (x, y)) for x, y in batches]))
    result = nk.tune_example_weight(model, batches, metric=distance, larger_is_better=False)
    assert abs(result.alpha - 0.93) < 0.006
    gained = (found[0] - found[1]).double()[1::2].mean().item()
    assert result.gain.mean == pytest.approx(gained, rel=0.05)
    result.undo()
    assert model[1].example_weight == 1.0


def test_layers_with_different_weights_keep_them_each():
    model = plain_net(nk.BatchNorm)
    model[5] = tracked_net()[5]
    with torch.no_grad():
        batches = [(x, model(x)) for x, _ in data(4, 8)]
    options = {"metric": distance, "larger_is_better": False, "grid": (0.2, 0.5)}
    result = nk.tune_example_weight(model, batches, **options)
    assert result.before == result.best == result.alpha == {"1": 0.0, "5": 1.0}
    assert (model[1].example_weight, model[5].example_weight) == (0.0, 1.0)
    assert result.reading.startswith("alpha stays 0 to 1, layer by layer: no other weight")
    assert all(point.gain < 0 for point in result.curve)
    assert result.plot().axes[0].get_ylabel().endswith("against alpha = the layers' own")


def test_statistics_that_no_longer_follow_are_weighed_by_what_they_are():
    model = plain_net(nk.BatchNorm)
    for index in (1, 5):
        model[index].track_running_stats = False
    assert nk.set_example_weight(model, 0.0) == ("1", "5")
    result = nk.tune_example_weight(model, answers((0.3, 0.3)), metric=distance,
                                    larger_is_better=False, grid=(0.3,), refine=False)  # fmt: skip
    assert result.alpha == 0.3


def right_between(monkeypatch, low, high):
    """Let every answer be right if the weight lies between two ends, and no other."""

    def score(output, _batch):
        return ((output[:, 0] >= low) & (output[:, 0] <= high)).double()

    monkeypatch.setitem(KNOWN, "accuracy", replace(KNOWN["accuracy"], score=score))
    return [(torch.randn(60, 2, 2, 2), torch.zeros(60).long())]


class Weight(nn.Module):
    """Puts out the example weight of its norm."""

    def __init__(self):
        super().__init__()
        self.norm = nk.BatchNorm(2)

    def forward(self, x):
        y = self.norm(x)
        return torch.full_like(y[:, :, 0, 0], float(self.norm.example_weight))


def test_accuracy_is_refined_and_ties_are_said(monkeypatch):
    batches = right_between(monkeypatch, 0.16, 0.22)
    rough = nk.tune_example_weight(Weight(), batches, metric="accuracy", refine=False)
    assert rough.tied == (rough.best,) == (0.2,)
    result = nk.tune_example_weight(Weight(), batches, metric="accuracy")
    assert result.tied == pytest.approx((0.166667, 0.183333, 0.2, 0.216667), abs=1e-6)
    assert result.alpha == result.best == 0.183333
    assert "(4 weights from 0.167 to 0.217 are equally good on those that do)" in str(result)


def test_of_weights_that_are_as_good_as_the_layers_own_that_one_is_kept(monkeypatch):
    batches = right_between(monkeypatch, 0, 0.5)
    result = nk.tune_example_weight(Weight(), batches, metric="accuracy")
    assert result.alpha == result.best == 0
    assert max(result.tied) == pytest.approx(0.466667, abs=1e-6)


def test_accuracy_is_the_share_of_right_answers():
    model, batches = plain_net(), data()
    result = nk.tune_example_weight(model, batches, metric="accuracy", grid=(0.2, 0.5))
    nk.set_example_weight(model, 0.5)
    right = torch.cat([model(x).argmax(1) == t for x, t in batches]).double().mean().item()
    assert_close(result.curve[-1].mean, right)
    assert "tuned for accuracy (larger is better)" in str(result)


def test_a_function_is_larger_better_unless_it_is_said_not_to_be():
    batches = answers((0.3, 0.3))
    down = tune_to(batches, grid=(0.3,), refine=False)
    up = tune_to(batches, grid=(0.3,), refine=False, larger_is_better=True)
    assert up.curve[-1].gain == -down.curve[-1].gain < 0
    assert up.curve[-1].mean == down.curve[-1].mean
    assert (up.best, down.best) == (0, 0.3)
    assert "tuned for distance (larger is better)" in str(up)


def test_dicts_with_a_forward_and_a_metric():
    pairs = answers((0.3, 0.3))
    result = tune_to(
        iter([{"picture": x, "answer": y} for x, y in pairs]),  # is read once
        metric=lambda output, batch: distance(output["scores"], (None, batch["answer"])),
        forward=lambda model, batch: {"scores": model(batch["picture"])},
    )
    expected = tune_to(pairs)
    assert result.how == expected.how == "from the first norm on"
    assert result.best == expected.best
    assert_close(result.gain.mean, expected.gain.mean)


def test_the_gain_on_other_data():
    result = tune_to(answers((0.3, 0.3)), grid=(0.3,), refine=False)
    nk.set_example_weight(result.model, 0.77)
    other = answers((0.5, 0.5), num_batches=2)
    gain = result.gain_on(other, alpha=0.4)
    assert result.model[1].example_weight == 0.77
    found = []
    for alpha in (0.0, 0.4):
        nk.set_example_weight(result.model, alpha)
        with torch.no_grad():
            found.append(torch.cat([distance(result.model(x), (x, y)) for x, y in other]))
    assert_close(gain.mean, (found[0] - found[1]).mean().item(), rtol=1e-5, atol=1e-6)
    assert gain.num_examples == 16
    assert result.gain_on(other, alpha=0.0).mean == 0
    with pytest.raises(OptionError, match=r"alpha=1.2 was given; it is a share"):
        result.gain_on(other, alpha=1.2)
    result.undo()
    with pytest.raises(OptionError, match="'1', '5' are no longer in the model: the tuning was"):
        result.gain_on(other)


def test_a_few_right_answers_more_are_no_gain():
    changes = torch.zeros(1000, dtype=torch.float64)
    changes[:4] = 1
    assert paired_gain(changes, binary=False).low > 0  # the normal interval believes it
    few = paired_gain(changes, binary=True)
    assert few.mean == 0.004
    center, error = 4 / 1002, math.sqrt(5 / 1002 - (4 / 1002) ** 2) / math.sqrt(1002)
    assert_close(few.low, center - 1.959964 * error, rtol=1e-6, atol=0)
    assert_close(few.high, center + 1.959964 * error, rtol=1e-6, atol=0)
    assert not few.significant
    changes[:9] = 1
    assert paired_gain(changes, binary=True).significant
    assert str(few).startswith("+0.004 (95 % interval -0.00")
    none = paired_gain(torch.zeros(9), binary=True)
    assert (none.mean, none.low, none.high) == (0, 0, 0)


def refused(model=None, batches=None, **options):
    nk.tune_example_weight(
        plain_net() if model is None else model, data() if batches is None else batches, **options
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "error"}, OptionError, r"metric='error' was given; it is one of 'loss', 'acc"),
        ({"metric": 3}, OptionError, "metric=3 was given"),
        ({"grid": (0.5, 1.5)}, OptionError, r"grid=1.5 was given; it is a share"),
        ({"grid": (0,)}, OptionError, r"grid=\(0.0,\) was given, and the layers have the weight 0"),
        ({"grid": ()}, OptionError, r"grid=\(\) was given; give at least one weight"),
        ({"metric": "accuracy", "per_layer": True}, OptionError, "which has no gradient to follow"),
        ({"batches": data(1, 3)}, DataError, "3 examples were given; half of them choose"),
        ({"batches": []}, DataError, "batches= gave no batch"),
        ({"batches": [torch.randn(4, 3, 9, 9)]}, DataError, "loss and accuracy take pairs"),
        ({"batches": [(torch.randn(4, 3, 9, 9), torch.rand(4))]}, DataError, "the target float32"),
        ({"batches": [(torch.full((4, 3, 9, 9), math.nan), torch.zeros(4).long())]}, DataError,
         "the loss of 4 of 4 examples is not finite with the weights that the layers have"),
        ({"metric": lambda output, batch: output.mean()}, DataError, r"gave shape \(\) for a bat"),
        ({"metric": lambda output, batch: 0.5}, DataError, "gave 0.5 for a batch"),
        ({"metric": lambda output, batch: output.argmax(1), "per_layer": True}, DataError,
         "the gradient of the metric <lambda> is 0 for all example weights"),
        ({"model": nn.Linear(3, 3)}, OptionError, "Linear has no BatchNorm and no layer of nor"),
        ({"model": nn.BatchNorm2d(3)}, OptionError, "the model is itself a BatchNorm2d"),
        ({"model": nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))}, OptionError,
         "nothing to weigh; 0: it has no running statistics"),
        ({"model": torch.compile(plain_net())}, OptionError, "is compiled"),
    ],
)  # fmt: skip
def test_misuse_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        refused(**options)
