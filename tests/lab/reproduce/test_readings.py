"""What tables read off trained networks, against definitions in float64."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import normkit as nk
from normkit.errors import SpecError
from normkit.lab import train as train_module
from normkit.lab.checkpoints import save_weights
from normkit.lab.data import Dataset, Examples, load
from normkit.lab.evaluation import evaluate
from normkit.lab.experiment import _silent
from normkit.lab.models import build_model
from normkit.lab.records import Epoch, Outcome
from normkit.lab.reproduce.tables import reading
from normkit.lab.reproduce.tables.analyses import ANALYSES
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables.figure import draw_table, panels_of
from normkit.lab.reproduce.tables.page import ours, table_markdown, table_text
from normkit.lab.reproduce.tables.reading import STATES, Reading, first_norms
from normkit.lab.reproduce.tables.readings import ReadingSpec, read_off
from normkit.lab.reproduce.tables.result import read_table_result
from normkit.lab.reproduce.tables.run import run_table
from normkit.lab.reproduce.tables.subject import Subject
from normkit.lab.reproduce.tables.table import Table
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.start import data_of
from normkit.lab.task import parse_task
from normkit.lab.train import train
from normkit.lab.work import Upkeep, Way

SPLITS = ("validation", "test")
SPEC = TrainingSpec(protocol=Protocol(), norm="bn", batch_size=8, seed=1)


def take(model, data, state, spec=SPEC):
    return reading.take(model, Subject(spec, data), state)


def examples(seed, size=40, num_classes=6):
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 * torch.randn(size, 2, 3, 3, generator=generator) + 1
    return Examples(inputs=inputs, targets=torch.arange(size) % num_classes)


@pytest.fixture
def dataset():
    train, validation, test = (examples(seed) for seed in range(3))
    return Dataset(name="drawn", num_classes=6, train=train, validation=validation, test=test)


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = nn.Sequential(nk.BatchNorm(2), nn.Flatten(), nn.Linear(18, 6)).eval()
    found[0].running_mean.copy_(torch.tensor([0.5, -1.0]))
    found[0].running_var.copy_(torch.tensor([4.0, 0.25]))
    return found


def by_definition(model, split, weight, mean=None, var=None):
    """Accuracy and loss with an example weight, or with other statistics; example by example."""
    norm, linear = model[0], model[2]
    mean = norm.running_mean.double().numpy() if mean is None else mean
    var = norm.running_var.double().numpy() if var is None else var
    losses, num_right = [], 0
    for x, target in zip(split.inputs.double().numpy(), split.targets.tolist(), strict=True):
        rows = []
        for channel in range(2):
            own, spread = x[channel].mean(), x[channel].var()
            m = weight * own + (1 - weight) * mean[channel]
            square = weight * (spread + own**2) + (1 - weight) * (var[channel] + mean[channel] ** 2)
            rows.append((x[channel] - m) / math.sqrt(square - m**2 + norm.eps))
        flat = np.array(rows).flatten()
        scores = (
            linear.weight.double().detach().numpy() @ flat + linear.bias.double().detach().numpy()
        )
        losses.append(math.log(np.exp(scores).sum()) - scores[target])
        num_right += int(scores.argmax() == target)
    return num_right / len(split), sum(losses) / len(losses)


@pytest.mark.parametrize(("state", "weight"), [("plain", 0.0), ("weight=0.3", 0.3)])
def test_a_network_is_evaluated_with_its_example_weight(model, dataset, state, weight):
    found = take(model, dataset, state)
    for split in SPLITS:
        accuracy, loss = by_definition(model, getattr(dataset, split), weight)
        assert found[split]["accuracy"] == pytest.approx(accuracy)
        assert found[split]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found[split]["weight"] == weight
    assert model[0].example_weight == 0.0  # a copy was changed


@pytest.mark.parametrize(("state", "at"), [("tuned-for-accuracy", 0), ("tuned-for-loss", 1)])
def test_the_weight_is_that_which_is_best_on_validation_examples(model, dataset, state, at):
    grid = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)
    sign = (1, -1)[at]
    scores = {w: sign * by_definition(model, dataset.validation, w)[at] for w in grid}
    best = min(w for w in grid if scores[w] == pytest.approx(max(scores.values()), abs=1e-9))
    assert best > 0  # else the test says little
    found = take(model, dataset, state)
    assert found["test"]["weight"] == best
    expected = by_definition(model, dataset.test, best)
    assert found["test"]["accuracy"] == pytest.approx(expected[0])
    assert found["test"]["loss"] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(("state", "of"), [("recalibrated", "train"), ("test-statistics", "test")])
def test_statistics_are_measured_on_the_split_that_is_named(model, dataset, state, of):
    values = getattr(dataset, of).inputs.double().numpy()
    mean, size = values.mean((0, 2, 3)), values[:, 0].size
    var = values.var((0, 2, 3)) * size / (size - 1)  # as torch's running variance
    found = take(model, dataset, state)
    for split in SPLITS:
        expected = by_definition(model, getattr(dataset, split), 0.0, mean, var)
        assert found[split]["accuracy"] == pytest.approx(expected[0])
        assert found[split]["loss"] == pytest.approx(expected[1], rel=1e-5)


def test_the_first_norms_of_blocks_are_batch_norms_that_xbn_leaves():
    model = build_model(
        "small-resnet:width=4:blocks=3", num_classes=10, input_shape=(1, 8, 8), norm="xbn/gn:2"
    ).model
    names = first_norms(model, 6)
    assert len(names) == 6
    assert len(first_norms(model, 2)) == 2
    assert all(isinstance(model.get_submodule(name), nk.BatchNorm) for name in names)
    second = [name.replace("norm1", "norm2") for name in names]
    assert all(isinstance(model.get_submodule(name), nk.GroupNorm) for name in second)


def test_disturbed_is_a_mean_over_five_draws_in_the_first_norms():
    data = load("digits")
    given = {"num_classes": 10, "input_shape": (1, 8, 8), "norm": "bn"}
    model = build_model("small-resnet:width=4:blocks=1", **given).model.eval()
    names = {"3.norm1", "4.norm1"}
    assert {*first_norms(model, 6)} == names
    accuracies = []
    for seed in range(1, 6):
        with nk.disturb_statistics(model, 0.7, seed=seed, where=lambda _, at: at in names):
            accuracies.append(evaluate(model, data.test)["accuracy"])
    assert len(set(accuracies)) > 1
    found = take(model, data, "disturbed=0.7")
    assert found["test"]["accuracy"] == pytest.approx(sum(accuracies) / 5)


@pytest.mark.parametrize("state", ["weight=0.3", "tuned-for-loss", "recalibrated"])
def test_a_network_without_running_statistics_is_as_it_was(dataset, state):
    torch.manual_seed(0)
    model = nn.Sequential(nk.GroupNorm(2, num_groups=1), nn.Flatten(), nn.Linear(18, 6)).eval()
    assert take(model, dataset, state) == take(model, dataset, "plain")


def test_analyses_are_means_over_the_layers_on_validation_examples():
    data = load("digits")
    given = {"num_classes": 10, "input_shape": (1, 8, 8)}
    model = build_model("small-resnet:width=4", norm="gn:2+ws", **given).model.eval()
    held = data.validation
    pairs = [(held.inputs[at : at + 32], held.targets[at : at + 32]) for at in range(0, 128, 32)]
    rows = nk.similarity_propagation(model, pairs).layers[1:]
    expected = {"ratio": nk.singularity_ratio(model).ratio}
    assert take(model, data, "singularity") == {"validation": expected, "test": expected}
    found = take(model, data, "similarity")["test"]
    assert found["before"] == pytest.approx(np.mean([row.input_difference for row in rows]))
    assert found["after"] == pytest.approx(np.mean([row.output_difference for row in rows]))
    steps = nk.projected_updates(model, pairs, rate=0.1).layers
    ratios = np.log([row.rate_ratio for row in steps])
    assert take(model, data, "projected")["test"]["ratio"] == pytest.approx(np.exp(ratios.mean()))
    hessian = take(model, data, "hessian")["test"]
    assert 0 < hessian["least"] <= hessian["reduction"] < 1
    plain = build_model("small-resnet:width=4", norm="gn:2", **given).model.eval()
    assert take(plain, data, "hessian")["test"] == {"reduction": None, "least": None}
    assert take(plain, data, "bound")["test"]["training"] <= 1


def test_readings_of_the_epochs_are_their_means():
    def epoch(loss, accuracy):
        scores = {"accuracy": accuracy, "loss": loss}
        return Epoch(
            learning_rate=0.1, train_loss=2 * loss, train_accuracy=0.5, validation_scores=scores
        )

    outcome = Outcome(status="finished", epochs=(epoch(1.0, 0.2), epoch(2.0, 0.6)))
    values = {
        text: Reading.parse(f"epochs: {text}").of_epochs(outcome)
        for text in ("training accuracy", "training loss", "validation accuracy", "validation loss")
    }
    assert [*values.values()] == pytest.approx([0.5, 3.0, 0.4, 1.5])
    diverged = outcome.model_copy(update={"status": "diverged"})
    assert Reading.parse("epochs").of_epochs(diverged) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight", "'weight' was given; the states are plain, weight=NUMBER, tuned-for-accuracy"),
        ("plain=1", "'plain=1' was given; the states are"),
        ("weight=x", "'weight=x' was given; after = comes a number"),
        ("plain: speed", "the numbers of plain are accuracy, loss, top5_accuracy, weight"),
        ("epochs: loss", "the numbers of epochs are training accuracy"),
    ],
)
def test_a_reading_that_there_is_not_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        Reading.parse(text)


def test_every_state_is_explained():
    for state in (*STATES, *ANALYSES):
        assert state in Reading.__doc__


def run(name, folder, seeds=(1,)):
    table = tables()[name]
    table = table.model_copy(update={"tiny": {**table.tiny, "seeds": seeds}})
    told = []
    result = run_table(
        table,
        "tiny",
        folder=folder,
        way=lambda place: Way(out=place, num_workers=1, upkeep=Upkeep(folder=place)),
        show=_silent,
        tell=told.append,
    )
    return table, result, told


def test_cells_have_what_is_read_off_the_networks_that_were_trained(tmp_path):
    table, result, told = run("S-F2", tmp_path)
    assert told == ["1 networks are evaluated in 4 states each"]
    (part,) = table.parts("tiny")
    (spec,) = part.sweep.runs()
    network, data = train(spec), data_of(spec.protocol)
    found = {cell.reading: cell.scores[0] for cell in result.cells}
    expected = take(network, data, "weight=0.99")["test"]
    assert found["w99"] == pytest.approx(100 * expected["accuracy"], abs=1e-3)
    plain = take(network, data, "plain")["test"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert found[""] == pytest.approx(100 * plain["accuracy"], abs=1e-3)
    again = run("S-F2", tmp_path)
    assert again[1].cells == result.cells
    assert again[2] == []  # nothing was evaluated again
    assert ours(result)[0] == ["", "c100", "c100 w99", *(f"c100 {n}" for n in (
        "loss", "tuned", "tuned_loss", "best"))]  # fmt: skip
    assert "w99 is weight=0.99; loss is plain: loss" in table_markdown(result)
    assert "w99 is weight=0.99" in table_text(result)
    draw_table(result, tmp_path / "figure.svg")
    assert [panel.number for panel in panels_of(result)] == ["accuracy", "loss", "weight"]


def test_networks_whose_weights_are_gone_are_trained_again(tmp_path):
    _, first, _ = run("S-B", tmp_path)
    for path in (tmp_path / "S-B").rglob("*.safetensors"):
        path.unlink()
    (tmp_path / "S-B" / "statistics" / "readings" / "records.jsonl").unlink()
    assert run("S-B", tmp_path)[1].cells == first.cells


def test_networks_that_are_given_are_evaluated_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    table = tables()["S-F1"]
    paper = {
        **table.paper, "data": "digits", "readings": ("w01",), "batch_sizes": (16,),
        "parts": {"resnet": {"model": "small-resnet:width=4", "weights": "own.safetensors"}},
    }  # fmt: skip
    claims = ()
    given = table.model_copy(update={"paper": paper, "claims": claims})
    network = build_model("small-resnet:width=4", num_classes=10, input_shape=(1, 8, 8), seed=3)
    model = network.model
    data = load("digits")
    nk.recalibrate(model, [data.train.inputs]).apply()
    (tmp_path / "weights").mkdir()
    save_weights(model.state_dict(), tmp_path / "weights" / "own.safetensors", {})
    result = run_table(
        given,
        "paper",
        folder=tmp_path / "out",
        way=lambda place: Way(out=place, num_workers=1, upkeep=Upkeep(folder=place)),
        show=_silent,
        tell=lambda note: None,
    )
    found = {cell.reading: cell.scores[0] for cell in result.cells}
    assert found[""] == pytest.approx(100 * evaluate(model, data.test)["accuracy"], abs=1e-3)
    assert not list((tmp_path / "out").rglob("report.html"))  # nothing was trained


TWO = """
import os
from pathlib import Path

from normkit.lab.experiment import _silent
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables import reading
from normkit.lab.reproduce.tables.result import read_table_result
from normkit.lab.reproduce.tables.run import run_table
from normkit.lab.work import Upkeep, Way

if __name__ == "__main__":
    table = tables()["S-F2"]
    tiny = {**table.tiny, "seeds": (1,), "processes": 2}
    way = lambda place: Way(out=place, upkeep=Upkeep(folder=place))
    given = {"folder": Path("FOLDER"), "way": way, "show": _silent, "tell": lambda note: None}
    result = run_table(table.model_copy(update={"tiny": tiny}), "tiny", **given)
    Path(f"FOLDER/{os.environ['RANK']}.json").write_text(result.model_dump_json())
"""


def test_one_of_several_processes_evaluates_for_all(tmp_path):
    program = tmp_path / "two.py"
    program.write_text(TWO.replace("FOLDER", str(tmp_path)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, str(program)], capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (read_table_result(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first.cells == second.cells
    found = {cell.reading: cell.scores for cell in first.cells}
    assert all(len(scores) == 1 for scores in found.values())
    assert found["loss"][0] > 0
    records = tmp_path / "S-F2" / "c100" / "readings" / "records.jsonl"
    assert len(records.read_text().splitlines()) == 1


SCENES = "scenes:items=digits:side=32:most=2:smallest=40:largest=70:test=6"
RESNET = "small-resnet:width=4:blocks=1:stages=3"
OF_TASKS = {
    "detection:channels=8:hidden=16:anchor=4:proposals=20:rois=8:detections=5": {
        "data": SCENES, "model": RESNET, "limit": 12,
    },
    "segmentation:stride=8:rate=1:channels=8": {"data": SCENES, "model": RESNET, "limit": 12},
    "video:frames=3": {
        "data": "clips:items=digits:side=20:test=6", "limit": 12,
        "model": "small-resnet:width=8:blocks=1:stages=2",
    },
    "few-shot:episodes=4": {"data": "digits", "model": "small-resnet:width=4:blocks=1:stages=2"},
    "adversarial:steps=1": {"data": "digits", "model": "mlp:depth=2:width=8", "limit": 100},
}  # fmt: skip


@pytest.mark.parametrize("task", OF_TASKS)
def test_networks_of_each_task_are_read_off_as_it_judges_them(task, tmp_path):
    protocol = Protocol(task=task, epochs=1, base_lr=0.01, **OF_TASKS[task])
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=4, seed=1)
    outcome = train_module.run(spec, upkeep=Upkeep(folder=tmp_path, save_weights=True)).outcome
    assert outcome.status == "finished", outcome.message
    states = ("plain", "weight=0", "weight=0.7", "recalibrated", "test-statistics")
    upkeep = Upkeep(folder=tmp_path / "readings")
    found = read_off(ReadingSpec(training=spec, states=states), upkeep=upkeep)
    assert found.message is None
    numbers = {name for name in outcome.scores if "interval" not in name}
    for state in states:
        assert numbers <= found.values[state]["test"].keys()
    for state in ("plain", "weight=0"):
        own = found.values[state]["test"]
        assert {name: own[name] for name in numbers} == pytest.approx(
            {name: outcome.scores[name] for name in numbers}, abs=1e-6
        )
        validation = found.values[state]["validation"]
        for name, value in outcome.epochs[-1].validation_scores.items():
            assert validation[name] == pytest.approx(value, abs=1e-6)
    assert len({str(found.values[state]) for state in states[2:]}) == 3


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("detection", "weight=0.1", ("weight=0.1", "ap", True)),
        ("detection", "tuned-for-ap: ap50", ("tuned-for-ap", "ap50", True)),
        ("instance-segmentation", "plain: mask_ap", ("plain", "mask_ap", True)),
        ("few-shot", "epochs: validation five_shot", ("epochs", "validation five_shot", True)),
        ("segmentation", "recalibrated: weight", ("recalibrated", "weight", False)),
        ("search", "plain: loss", ("plain", "loss", False)),
    ],
)
def test_numbers_of_a_reading_are_the_tasks(task, text, expected):
    found = Reading.parse(text, parse_task(task))
    assert (found.state, found.number, found.is_share) == expected


def test_readings_that_a_task_has_not_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"the numbers of plain are ap, ap50, .*, weight"):
        Reading.parse("plain: accuracy", parse_task("detection"))
    with pytest.raises(SpecError, match="the states are plain, weight=NUMBER, tuned-for-miou,"):
        Reading.parse("tuned-for-accuracy", parse_task("segmentation"))
    protocol = Protocol(task="domain-adaptation:method=source", limit=40, epochs=1)
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=8, seed=1)
    found = read_off(ReadingSpec(training=spec, states=("recalibrated",)))
    assert "has two domains, and no statistics for both; take method=adabn" in found.message
    (tmp_path / "own.safetensors").touch()
    given = Protocol(task="adversarial", weights=str(tmp_path / "own.safetensors"))
    spec = TrainingSpec(protocol=given, norm="bn", batch_size=8, seed=1)
    found = read_off(ReadingSpec(training=spec, is_trained=False, states=("plain",)))
    assert "as they are for classification only, and the task is adversarial" in found.message


def test_a_table_of_another_task_has_readings(tmp_path):
    table = Table.checked({
        "name": "T", "of": "zhou", "place": "Table", "title": "t", "arms": {"BN": "bn"},
        "readings": {"w05": "weight=0.5", "clean": "plain: clean"}, "small": {}, "tiny": {},
        "paper": {
            "task": "adversarial:steps=1", "data": "digits", "model": "mlp:depth=1:width=8",
            "limit": 60, "epochs": 1, "batch_sizes": (8,), "seeds": (1,),
        },
    })  # fmt: skip
    result = run_table(
        table,
        "paper",
        folder=tmp_path,
        way=lambda place: Way(out=place, num_workers=1, upkeep=Upkeep(folder=place)),
        show=_silent,
        tell=lambda note: None,
    )
    (part,) = table.parts("paper")
    subject = Subject.of(part.sweep.runs()[0])
    network = train(subject.spec)
    cells = {cell.reading: cell.scores[0] for cell in result.cells}
    assert cells["clean"] == pytest.approx(100 * subject.scores(network, "test")["clean"], abs=1e-3)
    nk.set_example_weight(network, 0.5)
    assert cells["w05"] == pytest.approx(100 * subject.scores(network, "test")["robust"], abs=1e-3)
    draw_table(result, tmp_path / "figure.svg")
