"""The doctor, on a good model and on the same model broken in one way each."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normkit as nk
from doctor import patients
from doctor.patients import broken, data, norms
from normkit.doctor.signs import Case, num_averaged

pytestmark = pytest.mark.xdist_group("doctor")  # the good model is trained once


@pytest.fixture(scope="module")
def digits():
    train, test = data()
    return train[:12], test


@pytest.fixture(scope="module")
def good():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield patients.good(data()[0])
    torch.set_num_threads(before)


def one_bright_example(train):
    """An epoch whose last batch is one scan that is far too bright."""
    x, target = train[3]
    return [*train, (4 * x[5:6], target[5:6])]


def case(name, good, digits):
    """A broken model with its training and test data."""
    train, test = digits
    if name == "small last batch":
        train = one_bright_example(train)
        return broken(patients.ended_by_one, good, train), train, test
    if name == "shifted test data":
        return good, train, [(2 * x + 2, target) for x, target in test]
    how = {
        "stale statistics": patients.stale,
        "16-bit statistics": patients.stalled,
        "averages of few examples": patients.hasty,
        "thawed statistics": patients.thawed,
        "dropout before the norm": patients.dropped,
        "statistics never set": patients.never_set,
        "broken statistics": patients.overflown,
    }[name]
    return broken(how, good, train), train, test


CASES = {
    "stale statistics": "recalibrate",
    "16-bit statistics": "recalibrate",
    "averages of few examples": "recalibrate",
    "thawed statistics": "recalibrate",
    "dropout before the norm": "recalibrate",
    "small last batch": "recalibrate",
    "statistics never set": "recalibrate",
    "broken statistics": "recalibrate",
    "shifted test data": "recalibrate on test inputs",
}


def test_nothing_is_wrong_with_a_good_model(good, digits):
    found = nk.diagnose(good, *digits)
    assert found.causes == ()
    assert found.reading.startswith("Nothing wrong with the norms' statistics: the test loss")
    assert found.findings == ()
    assert {row.cause for row in found.layers} == {None}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named_first_and_its_fix_works(name, good, digits):
    model, train, test = case(name, good, digits)
    found = nk.diagnose(model, train, test, batch_size=2 if "few" in name else None, try_fixes=True)
    first = found.causes[0]
    assert first.name == name
    assert found.reading.lower().startswith(name)
    healthy = loss_of(good, digits[1])
    tried = next(trial for trial in found.trials if trial.name == CASES[name])
    assert tried.gain.significant
    assert tried.loss < healthy + 0.02 < first.explains.mean + healthy
    assert first.explains.mean == pytest.approx(tried.gain.mean, rel=0.05)
    assert tried.loss == pytest.approx(found.states[0].loss - tried.gain.mean)


def loss_of(model, pairs):
    """Mean cross entropy at evaluation."""
    losses = []
    with torch.no_grad():
        for x, target in pairs:
            scores = model.eval()(x).double()
            losses += (scores.logsumexp(1) - scores.gather(1, target[:, None])[:, 0]).tolist()
    return sum(losses) / len(losses)


def test_losses_are_those_of_plain_forwards(good, digits):
    model, train, test = case("stale statistics", good, digits)
    found = nk.diagnose(model, train, test)
    states = {state.name: state for state in found.states}
    judged, halves = test, (test[::2], test[1::2])
    assert found.num_judged == sum(len(x) for x, _ in judged)
    assert states["as the model is"].loss == pytest.approx(loss_of(model, judged), rel=1e-9)
    healed = copy.deepcopy(model)
    nk.recalibrate(healed, train).apply()
    assert states["measured anew on the training data"].loss == pytest.approx(
        loss_of(healed, judged), rel=1e-9
    )
    adapted, total = copy.deepcopy(model), 0.0
    for half, other in (halves, halves[::-1]):
        nk.recalibrate(adapted, other).apply()
        total += loss_of(adapted, half) * sum(len(x) for x, _ in half)
    assert states["measured anew on other test inputs"].loss == pytest.approx(
        total / found.num_judged, rel=1e-9
    )
    by_batch = copy.deepcopy(model)
    for layer in norms(by_batch):
        layer.running_mean = layer.running_var = None
        layer.track_running_stats = False
    assert states["of each test batch"].loss == pytest.approx(loss_of(by_batch, judged), rel=1e-9)
    for row, (name, layer) in zip(found.layers, tracked(model), strict=True):
        one = copy.deepcopy(healed)
        one.get_submodule(name).load_state_dict(layer.state_dict())
        back = loss_of(one, judged) - loss_of(healed, judged)
        assert (row.name, row.returns) == (name, pytest.approx(back, rel=1e-6, abs=1e-9))


def tracked(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def test_the_layer_that_is_wrong_is_found(good, digits):
    model = copy.deepcopy(good)
    model[10].running_var.mul_(30)
    found = nk.diagnose(model, *digits)
    assert [(cause.name, cause.layers) for cause in found.causes] == [("stale statistics", ("10",))]
    assert "of 1 layer are not those of the training data; most in 10, whose" in found.reading
    assert {row.name: row.cause for row in found.layers if row.cause} == {"10": "stale statistics"}
    worst = max(found.layers, key=lambda row: row.returns)
    assert worst.name == "10"
    assert worst.std_high < 0.3
    assert all(row.returns < worst.returns / 10 for row in found.layers if row is not worst)


def test_several_causes_share_the_layers_and_are_ranked(good, digits):
    train, test = digits
    model = copy.deepcopy(good)
    model[10].reset_running_stats()
    model[22].running_mean.add_(5)
    found = nk.diagnose(model, train, [(x + 1, target) for x, target in test])
    causes = {cause.name: cause for cause in found.causes}
    assert set(causes) == {"statistics never set", "stale statistics", "shifted test data"}
    assert causes["statistics never set"].layers == ("10",)
    assert causes["stale statistics"].layers == ("22",)
    explained = [cause.explains.mean for cause in found.causes]
    assert explained == sorted(explained, reverse=True)
    everything = found.states[1].gain.mean  # what all new statistics gain
    parts = [cause.explains.mean for cause in found.causes if cause.layers]
    assert max(parts) == pytest.approx(everything)
    assert everything < max(row.returns for row in found.layers)


def test_statistics_of_the_first_checkpoint_are_found_to_be_better(good, digits):
    """A network that has learned behind other statistics than its data's, which then thawed."""
    train, test = digits
    model, draw = copy.deepcopy(good), torch.Generator().manual_seed(0)
    for layer in norms(model):
        away = layer.running_var.sqrt() * torch.randn(layer.num_features, generator=draw)
        layer.running_mean.add_(0.7 * away)
        layer.running_var.mul_((0.7 * torch.randn(layer.num_features, generator=draw)).exp())
    frozen = nk.freeze_statistics(model)
    for layer in norms(model):
        layer.requires_grad_(False)
    tuned = patients.train(model, train, epochs=8, rate=0.02)
    nk.thaw_statistics(tuned)
    first = copy.deepcopy(tuned.state_dict())
    for layer in norms(tuned):
        layer.requires_grad_(True)  # as in a file, which does not say what learns
    patients.follow(tuned, train)
    found = nk.diagnose(tuned, train, test, checkpoints={"epoch 1": first}, try_fixes=True)
    assert found.causes[0].name == "thawed statistics"
    assert found.causes[0].layers == frozen
    assert "are those of the first checkpoint" in found.causes[0].what
    tried = {trial.name: trial for trial in found.trials}
    restored = tried["statistics of the first checkpoint"]
    assert restored.gain.mean == pytest.approx(found.causes[0].explains.mean)
    assert restored.gain.significant
    assert restored.loss < 0.6 * tried["recalibrate"].loss  # measuring anew makes it worse


def test_estimation_shift_is_measured_at_every_checkpoint(good, digits):
    model, train, test = case("stale statistics", good, digits)
    states = {"good": good.state_dict(), "stale": model.state_dict()}
    found = nk.diagnose(model, train, test, checkpoints=states)
    assert [each.name for each in found.over_training] == ["good", "stale", "now"]
    expected = nk.estimation_shift(good, test).layers
    rows = found.over_training[0].shift.layers
    assert [row.esm_std for row in rows] == pytest.approx([row.esm_std for row in expected])
    now = [row.esm_std for row in found.over_training[2].shift.layers[1:]]
    assert now == [row.esm_std for row in found.layers]
    assert [row.esm_std for row in found.over_training[1].shift.layers[1:]] == pytest.approx(now)
    healed = nk.recalibrate(copy.deepcopy(model), train).apply().model
    after = [row.esm_std for row in nk.estimation_shift(healed, test).layers[1:]]
    assert [row.esm_std_recalibrated for row in found.layers] == pytest.approx(after)


class Failing(nn.Module):
    """Fails at one of its calls."""

    def __init__(self, error, at):
        super().__init__()
        self.error, self.left = error, at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
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


def test_a_running_average_is_as_sure_as_that_many_examples(good):
    """By the weights themselves: an average of n is as sure as 1 / (sum of squared weights)."""
    layer = norms(good)[0]
    name = next(name for name, module in good.named_modules() if module is layer)
    sick = Case(model=good, rows={}, dropped={}, last={}, sizes=(), batch_size=5, reference={})
    weights = [0.1 * 0.9**age for age in range(2000)]
    expected = 5 / math.fsum(weight**2 for weight in weights)
    assert num_averaged(sick, name) == pytest.approx(expected)


def test_what_cannot_be_is_refused_in_words(good, digits):
    train, test = digits
    with pytest.raises(
        nk.DataError, match="at even and at odd places have 45 and 0 examples; give"
    ):
        nk.diagnose(good, train, test[:1])
    with pytest.raises(nk.DataError, match="have 2 and 2 examples; give two batches or more, 4 ex"):
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


def test_batches_of_a_data_loader_are_counted(good, digits):
    """Its batches are lists of two tensors."""
    model, train, test = case("stale statistics", good, digits)

    def loader(pairs, size):
        whole = [torch.cat(values) for values in zip(*pairs, strict=True)]
        return DataLoader(TensorDataset(*whole), size)

    found = nk.diagnose(model, loader(train, 32), loader(test, 45))
    assert (found.batch_size, found.num_train) == (32, 12 * 32)
    assert found.causes[0].name == "stale statistics"


@pytest.mark.parametrize("how", ["frozen", "momentum 0", "evaluation"])
def test_statistics_that_stand_still_are_judged_too(how, good, digits):
    model = copy.deepcopy(good)
    model[10].running_var.mul_(30)
    if how == "frozen":
        nk.freeze_statistics(model)
    elif how == "momentum 0":
        model[10].momentum = 0.0
    else:
        model.train()[10].eval()
    found = nk.diagnose(model, *digits, try_fixes=how == "frozen")
    assert [cause.name for cause in found.causes] == ["frozen at other statistics"]
    assert found.causes[0].layers == ("10",)
    assert "1 layer is frozen, or has momentum 0, at statistics that are not" in found.reading
    if how == "frozen":
        recalibrated = next(trial for trial in found.trials if trial.name == "recalibrate")
        assert recalibrated.gain.significant
        assert recalibrated.call.startswith("nk.thaw_statistics(model); nk.recalibrate(")


def test_what_follows_a_micro_batch_norm_is_measured_behind_right_estimates(digits):
    train, test = digits
    torch.manual_seed(0)
    make = lambda channels: nk.BatchChannelNorm(channels, num_groups=4, micro_batch=True)  # noqa: E731
    model = patients.train(patients.network(make), train, epochs=3)
    for module in model.modules():
        if isinstance(module, nk.BatchChannelNorm):
            module.batch.running_mean.zero_()
            module.batch.running_var.fill_(1)
    found = nk.diagnose(model, train, test)
    nk.recalibrate(model, train, sequential=True).apply()
    assert found.states[1].loss == pytest.approx(loss_of(model, test), rel=1e-5)
    assert found.causes[0].explains.significant


def test_a_batch_knows_more_than_the_data(digits):
    """Every batch has its own brightness: no statistics of all of them serve any."""
    train, test = digits

    def lit(pairs):
        draw = torch.Generator().manual_seed(0)
        return [(x + 4 * torch.randn((), generator=draw), target) for x, target in pairs]

    torch.manual_seed(0)
    model = patients.train(patients.network(), lit(train), epochs=5)
    nk.recalibrate(model, lit(train)).apply()
    found = nk.diagnose(model, lit(train), lit(test))
    assert found.causes[0].name == "estimation shift"
    assert found.causes[0].explains.low > 0.5 * found.states[0].loss


def losses_of(model, pairs):
    """Cross entropy of each example at evaluation."""
    with torch.no_grad():
        scores = [(model.eval()(x).double(), target) for x, target in pairs]
    return torch.cat([-s.log_softmax(1).gather(1, t[:, None])[:, 0] for s, t in scores])


def test_what_looks_at_a_half_is_judged_by_the_other(good, digits):
    """Both the state and the trial, examples paired, against a cross-fit by hand."""
    _, train, test = case("shifted test data", good, digits)
    found = nk.diagnose(good, train, test, try_fixes=True)
    halves, gains = (test[::2], test[1::2]), []
    for judging, looked_at in (halves, halves[::-1]):
        adapted = copy.deepcopy(good)
        nk.recalibrate(adapted, looked_at).apply()
        gains.append(losses_of(good, judging) - losses_of(adapted, judging))
    gains = torch.cat(gains)
    half = 1.959964 * gains.std() / len(gains) ** 0.5
    state = next(state for state in found.states if "other test inputs" in state.name)
    trial = next(trial for trial in found.trials if trial.name == "recalibrate on test inputs")
    for gain in (state.gain, trial.gain):
        assert gain.mean == pytest.approx(float(gains.mean()), rel=1e-6)
        assert gain.low == pytest.approx(float(gains.mean() - half), rel=1e-5)


def test_sensitivity_is_the_loss_with_disturbed_statistics(good, digits):
    found = nk.diagnose(good, *digits)
    for row in found.sensitivity:
        losses = []
        for seed in range(row.num_seeds):
            with nk.disturb_statistics(good, row.delta, seed=seed):
                losses.append(loss_of(good, digits[1]))
        assert row.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert row.spread == pytest.approx(float(torch.tensor(losses).double().std()), rel=1e-5)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_a_loss_may_be_zero_or_below(sign, good, digits):
    model = case("statistics never set", good, digits)[0] if sign else good
    wrong = lambda output, batch: (output.argmax(1) != batch[1]).double() + sign  # noqa: E731
    found = nk.diagnose(model, *digits, loss=wrong)
    assert bool(found.causes) == bool(sign)


def test_losses_that_are_not_finite_are_counted(good, digits):
    found = nk.diagnose(case("broken statistics", good, digits)[0], *digits)
    assert found.states[0].loss == 100
    note = "359 of 359 losses as the model is, which are not finite and count as 100"
    assert note in found.notes


def test_test_data_that_are_not_finite_leave_the_rest_of_the_diagnosis(good, digits):
    train, test = digits
    broken_test = [(x.clone(), target) for x, target in test]
    broken_test[0][0][3] = torch.nan
    found = nk.diagnose(good, train, broken_test)
    assert any(note.startswith("statistics of the test inputs: ") for note in found.notes)
    assert found.states[1].name == "measured anew on the training data"
