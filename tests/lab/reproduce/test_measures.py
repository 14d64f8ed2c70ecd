"""What presets measure and read off, against definitions and numbers made by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import normkit as nk
from normkit.lab.course import Hooks, first_batches
from normkit.lab.data import load
from normkit.lab.loop import Loop
from normkit.lab.models import build_model
from normkit.lab.reproduce import PRESETS, channels, landscape_claims
from normkit.lab.reproduce.stack import readings
from normkit.lab.reproduce.tasks.drawn import arm_of
from normkit.lab.reproduce.tasks.networks import (
    DrawnNorm,
    four_layers,
    seeded_network,
    vgg11,
)
from normkit.lab.reproduce.tasks.records import rounded
from normkit.lab.reproduce.tasks.run import run_one
from normkit.lab.reproduce.tasks.settings import Data, Place, Plan, Training, recipe
from normkit.lab.reproduce.tasks.stack import measure_shift
from normkit.lab.work import Upkeep


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_a_drawn_norm_is_its_definition():
    norm = DrawnNorm(3, 2.0, 0.5, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = norm(x)
    for c in range(3):
        values = x[:, c]
        standard = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
        expected = norm.weight[c] * (norm.scales[c] * standard + norm.means[c]) + norm.bias[c]
        assert_close(y[:, c], expected)


def test_draws_have_the_spreads_that_were_asked_for():
    norm = DrawnNorm(20000, 2.0, 0.5, torch.Generator().manual_seed(0))
    assert norm.means.std().item() == pytest.approx(2, rel=0.03)
    assert norm.scales.log().std().item() == pytest.approx(0.5, rel=0.03)
    assert norm.scales.log().mean().item() == pytest.approx(0, abs=0.02)
    assert "means" not in dict(norm.named_parameters())


def test_drawn_networks_of_a_seed_differ_in_their_draws_alone(digits):
    near, far = (four_layers(digits, 4, spreads, seed=3) for spreads in ((0, 0), (1, 2)))
    for one, other in zip(near.parameters(), far.parameters(), strict=True):
        assert_close(one, other)
    assert near[1].means.abs().max() == 0 != far[1].means.abs().max()
    assert_close(far[1].means, four_layers(digits, 4, (2, 0), seed=3)[1].means / 2)


def test_at_width_64_the_network_is_the_labs_vgg11(digits):
    ours = vgg11("bn", digits, 64, seed=5)
    lab = build_model(
        "vgg11", num_classes=10, input_shape=digits.input_shape, norm="bn", seed=5
    ).model
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in lab.state_dict().items()
    }
    assert f"{ours}" == f"{lab}"


@pytest.mark.parametrize("make", [vgg11, None], ids=["vgg11", "mlp"])
def test_equal_seeds_give_equal_weights_whatever_the_norm(digits, make):
    def weights(norm):
        if make:
            model = make(norm, digits, 8, 1)
        else:
            model = seeded_network("mlp:depth=3:width=8", norm, digits, 1)
        assert (norm == "none") == (
            not any(isinstance(m, nk.BatchNorm | nk.GroupNorm) for m in model.modules())
        )
        return [
            m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
        ]

    for one, *others in zip(*map(weights, ("bn", "gn:2", "none")), strict=True):
        for other in others:
            assert_close(one, other)


def test_without_norms_training_and_test_error_of_equal_sets_are_one():
    settings = PRESETS["estimation-shift"].at("tiny").settings
    found = measure_shift(settings, "none", 1, Place())
    assert found["train_error"] == found["test_error"]
    assert found["iterations"] == [5, 10]
    assert (found["norms"], found["num_train"]) == ([], 60)


def test_the_shift_of_a_stack_is_that_of_its_last_state():
    settings = PRESETS["gnbn-small-training-sets"].at("tiny").settings
    found = measure_shift(settings, "gnbn-16", 1, Place())
    assert (found["norms"], found["num_train"]) == ([2, 4], 16)
    assert len(found["esm_std"]) == 1
    assert len(found["esm_std"][0]) == 2
    data = load("digits").test.inputs[:60].flatten(1).double()
    small = measure_shift(settings, "bn-16", 1, Place())
    assert small["input_shift"] == pytest.approx(found["input_shift"])
    assert 0 < found["input_shift"] < data.std(0).norm()


def test_readings_of_a_stack():
    values = {
        "iterations": [10, 20, 30, 40],
        "train_error": [0.5, 0.4, 0.3, 0.0],
        "test_error": [0.8, 0.6, 0.4, 0.9],
        "esm_std": [[1, 1, 3, 3], [1, 1, 1, 1], [2, 2, 2, 2], [9, 9, 9, 0]],
    }
    assert readings.gap(values) == pytest.approx(0.2)
    assert readings.growth(readings.early(values, "esm_std")) == pytest.approx(0.5)
    assert readings.growth(np.array([[1.0, 7.0, 3.0]])) == pytest.approx(2)  # the middle is in none
    assert readings.last_share(values, "esm_std") == pytest.approx(1)
    arms = {
        f"bn-{size}": {
            "num_train": size,
            "test_error": [value],
            "norms": [1, 2],
            "esm_std": [shift],
        }
        for size, value, shift in ((8, 0.5, [4.0, 2.0]), (32, 0.1, [1.0, 3.0]))
    }
    assert readings.slope(arms, "bn", lambda v: v["test_error"][-1]) == pytest.approx(-0.2)
    arms["gnbn-8"] = {"num_train": 8, "norms": [2], "esm_std": [[1.0]]}
    plain, blocked = readings.same_layers(arms, 8)
    assert (plain.tolist(), blocked.tolist()) == ([[2.0]], [[1.0]])
    assert readings.relative_shift(plain, blocked) == -0.5


def test_readings_of_a_landscape():
    def values(high):
        low = [1.0] * 8
        return {"min_loss": low, "max_loss": high, "min_change": low, "max_change": high}

    arms = {"gn": values([3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 9.0, 9.0]), "bn": values([2.0] * 8)}
    assert landscape_claims.relative(arms, ("gn", "bn"), "loss", "initial") == pytest.approx(1)
    assert landscape_claims.relative(arms, ("gn", "bn"), "change", "middle") == pytest.approx(0)
    assert landscape_claims.relative(arms, ("gn", "bn"), "loss") == pytest.approx(2)
    assert landscape_claims.lead(arms, "min_loss", "max_loss") == -1
    assert landscape_claims.level(arms, "bn") == 1.5


def test_readings_of_channels():
    arms = {
        arm_of(m, s): {
            "mean_spread": m,
            "scale_spread": s,
            "accuracy": 0.9 - 0.1 * m - 0.2 * s,
        }
        for m in (0.0, 1.0)
        for s in (0.0, 1.0, 2.0)
    }
    assert channels.slope(arms, "mean_spread", "scale_spread") == pytest.approx(-0.1)
    assert channels.slope(arms, "scale_spread", "mean_spread") == pytest.approx(-0.2)
    assert channels.farthest(arms)["accuracy"] == pytest.approx(0.4)


def test_pictures_shrink_by_averaging_squares():
    whole, half = (Data(data="digits", num_test=7, shrink=n).load_data() for n in (1, 2))
    assert half.test.inputs.shape == (7, 1, 4, 4)
    expected = whole.test.inputs[3, 0, 2:4, 4:6].mean()
    assert_close(half.test.inputs[3, 0, 1, 2], expected)
    assert_close(half.test.targets, whole.test.targets)


def test_training_slows_down_in_the_last_quarter_and_repeats_itself(monkeypatch):
    plan = Training(
        data="digits", num_train=40, batch_size=20, recipe=recipe(0.1, epochs=4, momentum=0.5)
    )
    data, ends, rates = plan.load_data(), [], []
    set_rate = Loop.set_rate
    monkeypatch.setattr(
        Loop, "set_rate", lambda loop, rate: rates.append(rate) or set_rate(loop, rate)
    )
    for _ in range(2):
        model, numbers, losses = seeded_network("mlp:depth=2:width=8", "bn", data, 0), [], []
        hooks = Hooks(
            before_epoch=numbers.append, after_step=lambda *found, to=losses: to.append(found)
        )
        plan.fit(model, data, 0, Place(), hooks)
        ends.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert rates[:8] == pytest.approx([0.1] * 6 + [0.01] * 2)
    assert ends[0][0] == ends[1][0]
    assert numbers == [0, 1, 2, 3, 4]
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(one, other)


def test_the_engine_trains_as_the_definition_says(digits):
    """Momentum and weight decay written out, in float64, on the batches of the seed's orders."""
    few = digits.train.take(torch.arange(10))
    model = seeded_network("mlp:depth=2:width=4", "bn", digits, 0).double()
    doubled = replace(few, inputs=few.inputs.double())
    plan = Plan(recipe(0.1, epochs=4, weight_decay=0.01), 4, 7)
    expected, speed = copy.deepcopy(model), {n: 0.0 for n, _ in model.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    for epoch in range(4):
        for index in torch.randperm(10, generator=generator).split(4):
            scores = expected(doubled.inputs[index]).log_softmax(1)
            loss = -scores[torch.arange(len(index)), few.targets[index]].mean()
            grads = torch.autograd.grad(loss, list(expected.parameters()))
            with torch.no_grad():
                for (name, p), grad in zip(expected.named_parameters(), grads, strict=True):
                    speed[name] = 0.9 * speed[name] + grad + 0.01 * p
                    p.sub_((0.1 if epoch < 3 else 0.01) * speed[name])
    Place().train(model, replace(digits, train=doubled), plan, Hooks())
    for (name, p), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(p, wanted, msg=name)


def test_the_first_batches_are_those_that_a_training_takes(digits):
    few = digits.train.take(torch.arange(10))
    seen = []
    hooks = Hooks(before_step=lambda _, parts: seen.extend(parts))
    model = seeded_network("mlp:depth=2:width=4", "bn", digits, 0)
    Place().train(model, replace(digits, train=few), Plan(recipe(0.1, steps=5), 5, 1), hooks)
    found = first_batches(few, 5, seed=1, num_steps=5)
    assert len(found) == len(seen) == 5
    for one, other in zip(found, seen, strict=True):
        assert_close(one.inputs, other.inputs)
    assert not torch.equal(found[0].inputs, found[2].inputs)
    assert_close(torch.cat([found[2].inputs, found[3].inputs]).sum(0), few.inputs.sum(0))


class Killed(BaseException):
    """Nothing may catch it, as nothing may catch SIGKILL."""


@pytest.mark.parametrize("name", ["output-noise", "gnbn", "landscape-along-gradient"])
def test_a_killed_run_goes_on_bit_for_bit(name, tmp_path):
    spec = PRESETS[name].specs("tiny")[-1]
    expected, count = run_one(spec), 0

    def kill_at_the_second():
        nonlocal count
        count += 1
        if count == 2:
            raise Killed

    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(Killed):
        run_one(spec, kill_at_the_second, upkeep)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    count = 10
    assert run_one(spec, upkeep=upkeep).values == expected.values
    assert not (tmp_path / "checkpoints").exists()


def test_numbers_are_rounded_for_records():
    assert rounded({"a": [1.23456, float("inf")], "b": 123456}) == {"a": [1.235, None], "b": 123456}
