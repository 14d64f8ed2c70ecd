"""The doctor, on a good model and on the same model broken in one way each."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normkit as nk
from doctor import patients
from doctor.patients import case, loss_of, norms
from normkit.doctor.symptoms import Case, num_averaged

pytestmark = pytest.mark.xdist_group("doctor")  # the good model is trained once


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
    assert "of 1 layer are not those of the training data; the farthest are in 10" in found.reading
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
    assert restored.loss < 0.8 * tried["recalibrate"].loss  # measuring anew makes it worse


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


def test_a_running_average_is_as_sure_as_that_many_examples(good):
    """By the weights themselves: an average of n is as sure as 1 / (sum of squared weights)."""
    layer = norms(good)[0]
    name = next(name for name, module in good.named_modules() if module is layer)
    sick = Case(model=good, rows={}, dropped={}, last={}, sizes=(), batch_size=5, reference={})
    weights = [0.1 * 0.9**age for age in range(2000)]
    expected = 5 / math.fsum(weight**2 for weight in weights)
    assert num_averaged(sick, name) == pytest.approx(expected)


def test_batches_of_a_data_loader_are_counted(good, digits):
    """Its batches are lists of two tensors."""
    model, train, test = case("stale statistics", good, digits)

    def loader(pairs, size):
        whole = [torch.cat(values) for values in zip(*pairs, strict=True)]
        return DataLoader(TensorDataset(*whole), size)

    found = nk.diagnose(model, loader(train, 32), loader(test, 45))
    assert (found.batch_size, found.num_train) == (32, 12 * 32)
    assert found.causes[0].name == "stale statistics"


@pytest.mark.parametrize("how", ["frozen", "momentum 0", "evaluation", "not tracking"])
def test_statistics_that_stand_still_are_judged_too(how, good, digits):
    model = copy.deepcopy(good)
    model[10].running_var.mul_(30)
    if how == "frozen":
        nk.freeze_statistics(model)
    elif how == "momentum 0":
        model[10].momentum = 0.0
    elif how == "not tracking":
        model[10].track_running_stats = False
    else:
        model.train()[10].eval()
    found = nk.diagnose(model, *digits, try_fixes=how == "frozen")
    assert [cause.name for cause in found.causes] == ["frozen at other statistics"]
    assert found.causes[0].layers == ("10",)
    assert "frozen, or has momentum 0 or track_running_stats off, at stat" in found.reading
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
        assert row.spread == pytest.approx(
            float(torch.tensor(losses, dtype=torch.float64).std()), rel=1e-5
        )
