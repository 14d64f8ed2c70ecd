"""Adversarial training: what is attacked, what statistics learn from, and how it is judged."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from normkit.errors import DataError, SpecError
from normkit.lab.course import nothing
from normkit.lab.data import open_data
from normkit.lab.data.given import read_given
from normkit.lab.experiment import compare
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.attack import Attack
from normkit.lab.train import _NOWHERE, _Training, run, train
from normkit.lab.work import Upkeep
from pictures import fill

STRONG = "adversarial:epsilon=0.1:step_size=0.05"
PROTOCOL = Protocol(
    task=STRONG, model="small-resnet:width=4:stages=1", data="digits", limit=200, epochs=2
)

ABLE = {"model": "wide-resnet:width=1", "limit": 400}  # learns enough to withstand some attacks


def spec_of(norm="bn", **changes):
    protocol = PROTOCOL.model_copy(update=changes)
    return TrainingSpec(protocol=protocol, norm=norm, batch_size=20, seed=1)


def sweep_of(**changes):
    protocol = PROTOCOL.model_copy(update=changes)
    return SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(20,), seeds=(1,))


def started(norm="bn", **changes):
    """A training that has not begun, its first batch, and its network."""
    spec = spec_of(norm, **changes)
    task = parse_task(spec.protocol.task)
    data = task.data(spec.protocol)
    training = task.start(spec, data, task.build(spec, data).model.train())
    return training, training.examples.take(torch.arange(20)), training.network


def moved(norm, before, inputs):
    """Buffers of a norm that sees a batch, from those before, by the definition."""
    n = inputs.numel() / inputs.shape[1]
    var = inputs.var((0, 2, 3), correction=0) * n / (n - 1)
    return 0.9 * before["mean"] + 0.1 * inputs.mean((0, 2, 3)), 0.9 * before["var"] + 0.1 * var


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ("", ["attacked"]),
        (":clean_share=0.5", ["attacked"]),
        (":statistics=clean", ["clean"]),
        (":statistics=both", ["clean", "attacked"]),
        (":attack_mode=train", ["attacked"]),
        (":attack_mode=train:statistics=clean:clean_share=0.3", ["clean"]),
    ],
)
def test_running_statistics_are_learned_from_the_batches_that_are_named(options, seen, monkeypatch):
    training, part, network = started(task=STRONG + options)
    attacks = []
    call = Attack.__call__

    def noted(self, *arguments):
        attacks.append(call(self, *arguments))
        return attacks[-1]

    monkeypatch.setattr(Attack, "__call__", noted)
    conv, norm = network[0], network[1]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    training.loss(network, part)
    (attacked,) = attacks
    assert not torch.equal(attacked, part.inputs)
    for name in seen:
        inputs = conv(part.inputs if name == "clean" else attacked)
        mean, var = moved(norm, {"mean": mean, "var": var}, inputs)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert int(norm.num_batches_tracked) == len(seen)
    assert all(module.training for module in network.modules())


def test_every_pass_counts_if_that_is_asked_for():
    training, part, network = started(task=f"{STRONG}:steps=3:attack_mode=train:statistics=every")
    training.loss(network, part)
    assert int(network[1].num_batches_tracked) == 4


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_mode_decides_by_which_statistics_the_attack_is_made(mode):
    """In evaluation mode a picture's attack does not depend on the others in the batch."""
    training, part, network = started(task=f"{STRONG}:attack_mode={mode}:random_start=no")
    network(part.inputs)  # statistics to evaluate by
    both = training._attacked(part)
    half = training._attacked(part.take(torch.arange(10)))
    assert torch.equal(both[:10], half) == (mode == "eval")


def test_the_loss_is_that_of_the_attacked_batch_mixed_with_the_clean_one():
    losses = {}
    for share in (0, 0.25):
        training, part, network = started("gn:2", task=f"{STRONG}:clean_share={share}")
        torch.manual_seed(0)
        found = training.loss(network, part)
        losses[share] = found.loss.item()
    torch.manual_seed(0)
    attacked = training._attacked(part)
    entropy = torch.nn.CrossEntropyLoss()
    on_attacked, on_clean = (
        entropy(network(x), part.targets).item() for x in (attacked, part.inputs)
    )
    assert losses[0] == pytest.approx(on_attacked, rel=1e-6)
    assert losses[0.25] == pytest.approx(0.75 * on_attacked + 0.25 * on_clean, rel=1e-6)
    assert found.num_right == int((network(attacked).argmax(1) == part.targets).sum())


def test_gradients_reach_the_weights_through_the_loss_only():
    training, part, network = started()
    training._attacked(part)
    assert all(p.grad is None for p in network.parameters())
    training.loss(network, part).loss.backward()
    assert all(p.grad is not None for p in network.parameters())


def test_training_on_attacks_makes_a_network_robust():
    """Judged by an attack that is written here, in pixels from 0 to 1, in float64."""
    plain = train(spec_of(task="classification", epochs=3, **ABLE))
    robust = train(spec_of(epochs=3, **ABLE))
    data = open_data("digits", 400)
    pictures = data.test.values.double() / 16
    mean, std = (float(t) / 16 for t in (data.test.scaling.mean, data.test.scaling.std))

    def right_share(network):
        network = network.double()
        x = pictures.clone()
        for _ in range(10):
            x.requires_grad_()
            loss = torch.nn.functional.cross_entropy(network((x - mean) / std), data.test.targets)
            (gradient,) = torch.autograd.grad(loss, x)
            x = x.detach() + 0.02 * gradient.sign()
            x = x.clamp(pictures - 0.1, pictures + 0.1).clamp(0, 1)
        return (network((x - mean) / std).argmax(1) == data.test.targets).double().mean().item()

    assert right_share(robust) > right_share(plain) + 0.15


def test_scores_are_of_attacked_and_clean_pictures_and_repeat():
    one, other = run(spec_of(**ABLE)).outcome, run(spec_of(**ABLE)).outcome
    assert one.status == "finished", one.message
    assert one == other
    assert list(one.scores) == ["robust", "clean", "attacked_shift", "clean_shift"]
    assert 0 < one.scores["robust"] < one.scores["clean"] < 1
    assert set(one.epochs[0].validation_scores) == {"robust", "clean"}


def test_running_statistics_are_near_those_of_the_pictures_they_were_learned_from():
    """With strong attacks the two differ; statistics learned from one are far from the other's."""
    options = {"model": "small-resnet:width=4:stages=1", "limit": 400, "epochs": 6}
    strong = "adversarial:epsilon=0.4:step_size=0.2"
    shifts = {
        learned: run(spec_of(task=f"{strong}:statistics={learned}", **options)).outcome.scores
        for learned in ("attacked", "clean")
    }
    assert shifts["attacked"]["attacked_shift"] < 0.7 * shifts["attacked"]["clean_shift"]
    assert shifts["clean"]["clean_shift"] < 0.7 * shifts["clean"]["attacked_shift"]


def shifts_by_definition(network, layers, pictures):
    """Distances of running means from those of each layer's input, in standard deviations."""
    given = {}
    hooks = [m.register_forward_pre_hook(lambda m, x: given.update({m: x[0]})) for m in layers]
    network(pictures)
    for hook in hooks:
        hook.remove()
    for layer, x in given.items():
        values = x.detach().double().movedim(1, 0).flatten(1)
        away = layer.running_mean.double() - values.mean(1)
        unit = (values.var(1, correction=0) + layer.eps).sqrt()
        yield (away / unit).square().mean().sqrt()


def test_shifts_are_those_of_the_attacked_and_the_clean_test_pictures(monkeypatch):
    """Every layer's inputs are caught by hooks on both kinds of pictures."""
    training, _, network = started(task=f"{STRONG}:test_pictures=30")
    kept = [m for m in network.modules() if hasattr(m, "running_mean")]
    for at, layer in enumerate(kept):
        torch.nn.init.constant_(layer.running_mean, 0.1 * at)
    seen = []
    attacked = Attack.__call__
    monkeypatch.setattr(
        Attack, "__call__", lambda *given: seen.append(attacked(*given)) or seen[-1]
    )
    loop = SimpleNamespace(device=torch.device("cpu"), share=(0, 1), model=network.eval())
    found = training.evaluate(loop, "test")
    clean = training._held["test"].take(torch.arange(30)).inputs
    for name, pictures in (("attacked_shift", seen[0]), ("clean_shift", clean)):
        expected = shifts_by_definition(network, kept, pictures)
        assert found[name] == pytest.approx(float(sum(expected) / len(kept)), rel=1e-6)
    assert "attacked_shift" not in training.evaluate(loop, "validation")


def test_a_network_without_running_statistics_has_no_shifts():
    assert list(run(spec_of("gn:2")).outcome.scores) == ["robust", "clean"]


def test_more_steps_in_the_test_find_more_errors():
    one = f"{STRONG}:steps=1"
    weak, strong = (
        run(spec_of(task=f"{one}:test_steps={n}", **ABLE)).outcome.scores for n in (1, 10)
    )
    assert weak["clean"] == strong["clean"]
    assert weak["robust"] > strong["robust"] + 0.05


def test_a_part_of_the_test_pictures_can_be_judged():
    task = f"{STRONG}:test_pictures=30"
    scores = run(spec_of(task=task)).outcome.scores
    shares = scores["robust"], scores["clean"]
    assert all((30 * score) % 1 == pytest.approx(0, abs=1e-9) for score in shares)
    training, _, _ = started(task=task)
    assert training._held["test"].targets.bincount().tolist() == [3] * 10


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    spec = spec_of(norm="gn:2")
    whole = run(spec)
    num_steps = 0

    def kill():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 13:
            raise KeyboardInterrupt

    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(spec, kill, upkeep)
    assert run(spec, upkeep=upkeep).outcome == whole.outcome


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_other_precisions_train(precision):
    assert run(spec_of(precision=precision, epochs=1)).outcome.status == "finished"


def test_fractions_are_read_and_defaults_are_the_papers():
    task = parse_task("adversarial:epsilon=8/255:step_size=2/255")
    assert task.epsilon == 8 / 255
    assert str(parse_task("adversarial")) == "adversarial"
    assert parse_task("adversarial").epsilon == pytest.approx(0.0157, abs=5e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("epsilon=0", r"epsilon was given '0': .* greater than 0; give how far .* --task class"),
        ("epsilon=2", r"epsilon was given '2': .* less than or equal to 1"),
        ("epsilon=1/0", r"epsilon was given '1/0': .* such as 8/255"),
        ("steps=0", r"steps was given '0': .*; give the steps of an attack in training, 1 or more"),
        ("attack_mode=test", r"attack_mode was given 'test': .* eval or train"),
        ("statistics=every", r"every learns from the passes of the attack, .* attack_mode=train"),
        ("clean_share=1", r"clean_share was given '1': .* in \[0, 1\)"),
        ("eps=1", r"has the argument 'eps=1'; it takes epsilon=..., step_size=..."),
    ],
)
def test_options_out_of_bounds_are_answered_in_a_sentence(options, message):
    with pytest.raises(SpecError, match=message):
        parse_task(f"adversarial:{options}")


def checked(**changes):
    sweep = sweep_of(**changes)
    task = parse_task(sweep.protocol.task)
    task.check(sweep, task.data(sweep.protocol))


def test_what_does_not_go_with_attacks_is_refused():
    with pytest.raises(SpecError, match=r"--mixup was given 0.2, but attacks raise"):
        checked(mixup=0.2)
    with pytest.raises(SpecError, match="statistics=both takes two passes in a step"):
        checked(task="adversarial:statistics=both", processes=2)
    with pytest.raises(DataError, match=r"go from 0 to 16, .* taken for 2 and 16"):
        checked(task="adversarial:low=2")


def given(values):
    targets = torch.arange(len(values)) % 2
    return read_given(TensorDataset(values, targets), "mine")


@pytest.mark.parametrize(
    ("values", "options", "ends"),
    [
        (torch.linspace(0, 1, 400), "", (0, 1)),
        (torch.linspace(-1, 1, 400), ":low=-1:high=1", (-1, 1)),
        (torch.linspace(0, 255, 400).byte(), "", (0, 255)),
        (torch.linspace(0, 200, 400).byte(), "", (0, 255)),
        (torch.linspace(0, 15, 400).byte(), "", (0, 15)),  # as pictures of 4 bits
        (torch.linspace(0, 15, 400).byte(), ":high=255", (0, 255)),
    ],
)
def test_black_and_white_are_those_of_the_pictures(values, options, ends):
    data = given(values.view(100, 1, 2, 2))
    pixels = parse_task(f"adversarial{options}").pixels_of(data)
    scaling = data.train.scaling
    mean, std = (0, 1) if scaling is None else (float(scaling.mean), float(scaling.std))
    found = [float(pixels.low) * std + mean, float(pixels.high) * std + mean]
    assert found == pytest.approx([*ends], abs=1e-4)


def test_pictures_in_floating_point_beyond_black_and_white_are_refused():
    data = given(torch.randn(100, 1, 2, 2))
    with pytest.raises(DataError, match=r"pixels of mine go from -.* taken for 0 and 1; give byt"):
        parse_task("adversarial").pixels_of(data)


def test_the_report_says_what_statistics_were_learned_from():
    task = parse_task("adversarial:attack_mode=train:statistics=clean:clean_share=0.5")
    loss, running, shifts = task.sentences
    assert "by 0.5 on the clean batch" in loss
    assert "training mode, so by the statistics of the batch under attack" in loss
    assert "running statistics are learned from the clean batches" in running
    assert "means of attacked and of clean test pictures, in standard deviations" in shifts


def test_a_model_and_pictures_of_ones_own(tmp_path):
    fill(tmp_path / "photos", per_class=20)
    (tmp_path / "my.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    found = compare(
        norms=["bn", "gn:2"],
        batch_sizes=[8],
        seeds=[1],
        task="adversarial:epsilon=8/255",
        model=f"{tmp_path}/my.py:net",
        data=f"folder:{tmp_path}/photos",
        epochs=1,
        out=tmp_path / "out",
    )
    assert [r.outcome.status for r in found.records] == ["finished"] * 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Test robust" in page
    assert "running statistics are learned from the attacked batches" in page
    assert all(np.isfinite(list(r.outcome.scores.values())).all() for r in found.records)
    assert [len(r.outcome.scores) for r in found.records] == [4, 2]
    for score in ("clean", "attacked_shift", "clean_shift"):
        assert f"Test {score.replace('_', ' ')}" in page


def test_measuring_the_memory_of_a_step_teaches_the_runs_network_nothing():
    spec = spec_of(task="adversarial:statistics=every:attack_mode=train:steps=2")
    task = parse_task(spec.protocol.task)
    data = task.data(spec.protocol)
    built = task.build(spec, data)
    training = _Training(spec, data, built, Upkeep(), _NOWHERE, nothing)
    assert training._peak_bytes() > 0
    counts = [b for name, b in built.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)
