"""The doctor with any model, loss and data: what stays, what is said, what is refused."""

import copy
import json

import pytest
import torch
from torch import nn

import normkit as nk
from doctor import patients
from doctor.patients import case

pytestmark = pytest.mark.xdist_group("doctor")  # the good model is trained once


class Failing(nn.Module):
    """Fails at one of its calls."""

    def __init__(self, error, at):
        super().__init__()
        self.error, self.calls = error, iter(range(at - 1, -1, -1))  # which no tool puts back

    def forward(self, x):
        if next(self.calls) == 0:
            raise self.error
        return x


@pytest.mark.parametrize(
    ("at", "training"),
    [(None, True), (3, True), (31, False), (45, True), (90, False), (120, True), (180, False)],
)
def test_the_model_is_left_as_it_was(at, training, good, digits):
    train, test = digits
    model = nn.Sequential(*copy.deepcopy(good), Failing(KeyboardInterrupt("now"), at or 10**9))
    model[2].running_var.mul_(9)
    model.train(training)
    model[6].training = not training
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rng, hooks = torch.get_rng_state(), hooks_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        nk.diagnose(model, train, test, try_fixes=True)
        ended = True
    except KeyboardInterrupt:
        ended = False
    assert ended == (at is None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert hooks_of(model) == hooks
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_a_model_without_running_statistics_has_other_measures(digits):
    torch.manual_seed(0)
    model = patients.network(lambda channels: nn.GroupNorm(4, channels)).eval()
    found = nk.diagnose(model, *digits, try_fixes=True)
    assert found.causes == ()
    assert [state.name for state in found.states] == ["as the model is"]
    assert found.channel_difference is not None
    assert found.sensitivity == ()
    assert found.reading.startswith("There are no running statistics that could be wrong: the")


def test_batches_of_one_value_are_measured_too(digits):
    """`BatchNorm1d` refuses to normalise a single example by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    train, test = digits
    alone = [(test[0][0][:1], test[0][1][:1])]
    found = nk.diagnose(model, [*train, *alone], [*test[:2], *alone, *alone])
    assert found.layers[0].mean_shift is not None
    assert any(note.startswith("each test batch's own statistics: ") for note in found.notes)


def test_the_loss_may_be_any(good, digits):
    model, train, test = case("stale statistics", good, digits)

    def squares(output, batch):
        return (output.softmax(1) - nn.functional.one_hot(batch["y"], 10)).square().sum(1)

    def named(pairs):
        return [{"input": x, "y": target} for x, target in pairs]

    found = nk.diagnose(model, named(train), named(test), loss=squares, try_fixes=True)
    assert found.causes[0].name == "stale statistics"
    assert found.states[0].accuracy is None
    assert 0 < found.states[0].loss < 2
    assert all(trial.loss is None or trial.loss < 2 for trial in found.trials)


def test_a_diagnosis_prints_and_is_json(good, digits):
    model, train, test = case("stale statistics", good, digits)
    found = nk.diagnose(model, train, test, try_fixes=True)
    text = str(found)
    assert "1. stale statistics: explains +" in text
    assert "fix: nk.recalibrate(model, train_batches).apply()" in text
    assert "cannot be done: Sequential has no residual blocks" in text
    read = json.loads(found.to_json())
    assert read["measure"] == "Diagnosis"
    assert read["causes"][0]["explains"]["mean"] == found.causes[0].explains.mean
    assert len(read["layers"]) == len(found.layers) == 6
    assert found.table().count("\n") == 6
    assert found.plot().axes[0].get_legend_handles_labels()[1] == [
        "esm std",
        "esm std recalibrated",
    ]


def test_what_cannot_be_is_refused_in_words(good, digits):
    train, test = digits
    with pytest.raises(
        nk.DataError, match="at even and at odd places have 45 and 0 examples; give"
    ):
        nk.diagnose(good, train, test[:1])
    with pytest.raises(
        nk.DataError, match="have 2 and 2 examples; give two batches or more, with 4 ex"
    ):
        nk.diagnose(good, train, [(x[:2], target[:2]) for x, target in test[:2]])
    with pytest.raises(nk.DataError, match="train_batches= gave no batch"):
        nk.diagnose(good, [], test)
    with pytest.raises(nk.DataError, match="pass batch_size="):
        nk.diagnose(good, [None], test, forward=lambda model, batch: model(test[0][0]))
    with pytest.raises(nk.DataError, match=r"target 10 was given, .* 10 classes, 0 to 9; che"):
        nk.diagnose(good, train, [(x, target + 1) for x, target in test])
    with pytest.raises(nk.DataError, match=r"loss and accuracy take pairs \(inputs, target\)"):
        nk.diagnose(good, train, [x for x, _ in test])
    other = {"early": {**good.state_dict(), "0.weight": torch.zeros(1)}}
    with pytest.raises(nk.DataError, match=r"checkpoint 'early' is of another model: 0\.weight"):
        nk.diagnose(good, train, test, checkpoints=other)
    with pytest.raises(nk.DataError, match="'early' holds other things than tensors; give the st"):
        nk.diagnose(good, train, test, checkpoints={"early": {"state_dict": good.state_dict()}})
    with pytest.raises(nk.OptionError, match="batch_size"):
        nk.diagnose(good, train, test, batch_size=0)
    with pytest.raises(nk.OptionError, match="does not know its number of channels"):
        nk.diagnose(nn.Sequential(nn.LazyBatchNorm2d(), *good[3:]), train, test)
    with pytest.raises(nk.OptionError, match="diagnose the model"):
        nk.diagnose(nn.DataParallel(good), train, test)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_a_loss_may_be_zero_or_below(sign, good, digits):
    model = case("statistics never set", good, digits)[0] if sign else good
    wrong = lambda output, batch: (output.argmax(1) != batch[1]).double() + sign  # noqa: E731
    found = nk.diagnose(model, *digits, loss=wrong)
    assert bool(found.causes) == bool(sign)


def test_losses_that_are_not_finite_are_counted(good, digits):
    found = nk.diagnose(case("broken statistics", good, digits)[0], *digits)
    assert found.states[0].loss == 100
    note = "359 of 359 losses as the model is: they are not finite, and each counts as 100"
    assert note in found.notes


def test_test_data_that_are_not_finite_leave_the_rest_of_the_diagnosis(good, digits):
    train, test = digits
    broken_test = [(x.clone(), target) for x, target in test]
    broken_test[0][0][3] = torch.nan
    found = nk.diagnose(good, train, broken_test)
    assert any(note.startswith("statistics of the test inputs: ") for note in found.notes)
    assert found.states[1].name == "measured anew on the training data"
