"""Each epoch's figures in TensorBoard, CSV, W&B and MLflow: what arrives is what the record has."""

import csv
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import normkit as nk
from normkit.cli.app import run as command
from normkit.errors import PackageError, SpecError
from normkit.lab.loggers import Logger, require_loggers
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import run
from normkit.lab.work import Upkeep

STEPS = [4, 8, 12]  # of the optimizer, at the end of each epoch


@pytest.fixture
def spec(protocol):
    changed = protocol.model_copy(update={"epochs": 3})
    return TrainingSpec(protocol=changed, norm="gn:2", batch_size=10, seed=1)


@pytest.fixture
def logged(spec, tmp_path):
    """Run with a logger; gives what each epoch has in the record, by name."""

    def log(name):
        record = run(spec, upkeep=Upkeep(folder=tmp_path, loggers=(name,)))
        epochs = record.outcome.epochs
        assert "accuracy" in epochs[0].validation_scores
        return [
            {"learning_rate": e.learning_rate, "train_loss": e.train_loss}
            | {"train_accuracy": e.train_accuracy}
            | {f"validation_{name}": value for name, value in e.validation_scores.items()}
            | {f"test_{name}": value for name, value in e.test_scores.items()}
            for e in epochs
        ]

    return log


def test_tensorboard_has_every_epoch(logged, spec, tmp_path):
    epochs = logged("tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / spec.file_name))
    events.Reload()
    names = set().union(*epochs)
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        given = [(s, e[name]) for s, e in zip(STEPS, epochs, strict=True) if name in e]
        expected = [(step, pytest.approx(value)) for step, value in given]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


def test_a_csv_file_has_every_epoch(logged, spec, tmp_path):
    epochs = logged("csv")
    assert rows(tmp_path / "logs" / spec.file_name / "metrics.csv") == [
        epoch | {"step": step} for step, epoch in zip(STEPS, epochs, strict=True)
    ]


def test_a_run_that_was_killed_has_every_epoch(logged, spec, tmp_path):
    class Killed(BaseException):
        pass

    count = 0

    def kill_in_the_third_epoch():
        nonlocal count
        count += 1
        if count == 10:
            raise Killed

    upkeep = Upkeep(folder=tmp_path, loggers=("csv",), checkpoint_seconds=0)
    with pytest.raises(Killed):
        run(spec, kill_in_the_third_epoch, upkeep)
    assert list((tmp_path / "checkpoints").iterdir())
    epochs = logged("csv")
    assert rows(tmp_path / "logs" / spec.file_name / "metrics.csv") == [
        epoch | {"step": step} for step, epoch in zip(STEPS, epochs, strict=True)
    ]


OWN = """
from torch import nn

def train(apply_norm, batch_size, seed, report):
    apply_norm(nn.BatchNorm1d(4))
    for step in range(3):
        report(loss=1 / (step + 1))
    report()
    if seed:
        report(name="no number")
    return {"accuracy": 0.5}
"""


def test_numbers_that_a_training_of_ones_own_reports(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    protocol = Protocol(train=f"{tmp_path / 'own.py'}:train")
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=2, seed=0)
    upkeep = Upkeep(folder=tmp_path, loggers=("csv",))
    run(spec, upkeep=upkeep)
    assert rows(tmp_path / "logs" / spec.file_name / "metrics.csv") == [
        {"loss": 1.0, "step": 1}, {"loss": 1 / 2, "step": 2}, {"loss": 1 / 3, "step": 3},
        {"accuracy": 0.5, "step": 4},
    ]  # fmt: skip
    outcome = run(spec.model_copy(update={"seed": 1}), upkeep=upkeep).outcome
    assert "report(...) in" in outcome.message
    assert "was given {'name': 'no number'}; give it numbers" in outcome.message


def rows(path):
    with path.open() as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


PROBED = """
import normkit as nk
import torch
from torch import nn

def train(apply_norm, batch_size, seed, report):
    torch.manual_seed(seed)
    net = apply_norm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    with nk.Probe(net, every=2, writer=report) as probe:
        for _ in range(4):
            loss = net(torch.randn(batch_size, 4)).square().mean()
            loss.backward()
            probe.step(loss)
            report(loss=loss.item())
    return {"loss": loss.item(), "shift_std": probe.records[-1].layers[1].shift_std}
"""


def test_a_probe_in_a_training_of_ones_own_writes_to_the_runs_loggers(tmp_path):
    (tmp_path / "own.py").write_text(PROBED)
    protocol = Protocol(train=f"{tmp_path / 'own.py'}:train")
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=8, seed=0)
    outcome = run(spec, upkeep=Upkeep(folder=tmp_path, loggers=("csv",))).outcome
    assert (outcome.status, outcome.num_steps) == ("finished", 4)
    found = rows(tmp_path / "logs" / spec.file_name / "metrics.csv")
    of_probe = [row for row in found if "normkit/loss" in row]
    assert [row["step"] for row in of_probe] == [2, 4]
    assert of_probe[-1]["normkit/loss"] == pytest.approx(outcome.scores["loss"])
    assert of_probe[-1]["normkit/shift_std/1"] == outcome.scores["shift_std"]
    assert [row["loss"] for row in found if row.get("step") == 2 and "loss" in row]


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_a_probe_on_the_engines_network_changes_nothing_and_writes_to_the_loggers(
    spec, tmp_path, norm
):
    spec = spec.model_copy(update={"norm": norm})
    upkeep = Upkeep(folder=tmp_path, loggers=("csv",), probe_every=3)
    outcome = run(spec, upkeep=upkeep).outcome
    assert outcome == run(spec).outcome
    found = rows(tmp_path / "logs" / spec.file_name / "metrics.csv")
    of_probe = [row for row in found if "normkit/loss" in row]
    assert [row["step"] for row in of_probe] == [3, 6, 9, 12]
    epochs = [row["train_loss"] for row in found if "train_loss" in row]
    assert epochs == [epoch.train_loss for epoch in outcome.epochs]
    assert any("normkit/shift_std" in name for name in of_probe[0]) == (norm == "bn")


def test_a_probe_goes_on_counting_where_a_run_was_killed(spec, tmp_path):
    class Killed(BaseException):
        pass

    count = 0

    def kill_at_the_seventh_step():
        nonlocal count
        count += 1
        if count == 7:
            raise Killed

    every = Upkeep(folder=tmp_path, loggers=("csv",), checkpoint_seconds=0, probe_every=2)
    with pytest.raises(Killed):
        run(spec, kill_at_the_seventh_step, every)
    run(spec, upkeep=every)
    found = rows(tmp_path / "logs" / spec.file_name / "metrics.csv")
    assert [row["step"] for row in found if "normkit/loss" in row] == [8, 10, 12]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--probe-every", "2"], "--probe-every was given 2 without --loggers"),
        (["--probe-every", "0", "--loggers", "csv"], "--probe-every was given 0: "),
        (
            ["--probe-every", "2", "--loggers", "csv", "--train", "own.py:train"],
            "makes its own",
        ),
    ],
)
def test_a_probe_that_would_write_nowhere_is_refused(tmp_path, capsys, given, said):
    assert command(["compare", *given, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Wandb:
    """Takes what ``wandb.init`` and its ``Run`` take."""

    def __init__(self):
        self.begun, self.logged, self.is_finished = None, [], False

    def init(self, *, project, name, dir, config, reinit):
        self.begun = {"project": project, "name": name, "dir": dir, "config": config}
        assert reinit == "create_new"
        return self

    def log(self, data, step=None, commit=None):
        self.logged.append((step, data))

    def finish(self, exit_code=None):
        self.is_finished = True


def test_wandb_gets_every_epoch(logged, spec, tmp_path, monkeypatch):
    wandb = Wandb()
    install(monkeypatch, "wandb", wandb)
    epochs = logged("wandb")
    assert wandb.logged == list(zip(STEPS, epochs, strict=True))
    assert wandb.is_finished
    assert wandb.begun["project"] == "normkit"
    assert wandb.begun["name"] == spec.file_name
    assert wandb.begun["dir"] == str(tmp_path / "logs")
    assert wandb.begun["config"]["norm"] == "gn:2"
    assert wandb.begun["config"]["base_lr"] == spec.protocol.base_lr


class Mlflow:
    """Takes what ``mlflow.MlflowClient`` takes; it has no experiment at first."""

    def __init__(self):
        self.experiments, self.params, self.metrics, self.ended = {}, {}, [], []

    def get_experiment_by_name(self, name):
        found = self.experiments.get(name)
        return None if found is None else SimpleNamespace(experiment_id=found)

    def create_experiment(self, name, artifact_location=None, tags=None):
        return self.experiments.setdefault(name, "7")

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        assert experiment_id == "7"
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run of {run_name}"))

    def log_param(self, run_id, key, value):
        self.params[run_id, key] = value

    def log_metric(self, run_id, key, value, timestamp=None, step=None):
        self.metrics.append((run_id, step, key, value))

    def set_terminated(self, run_id, status=None, end_time=None):
        self.ended.append((run_id, status))


def test_mlflow_gets_every_epoch(logged, spec, monkeypatch):
    client, name = Mlflow(), f"run of {spec.file_name}"
    install(monkeypatch, "mlflow", SimpleNamespace(MlflowClient=lambda: client))
    for _ in range(2):  # the second run finds the experiment
        client.metrics, client.ended = [], []
        epochs = logged("mlflow")
        assert client.metrics == [
            (name, step, key, value)
            for step, epoch in zip(STEPS, epochs, strict=True)
            for key, value in epoch.items()
        ]
    assert client.params[name, "norm"] == "gn:2"
    assert client.ended == [(name, None)]


def install(monkeypatch, name, module):
    real = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: module if n == name else real(n, *rest)
    )


def test_unknown_loggers_are_refused_with_those_there_are():
    with pytest.raises(SpecError, match=r"no logger 'comet'; known are tensorboard, csv, wandb"):
        require_loggers(["csv", "comet"])


def test_a_logger_that_is_not_installed_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r"the logger wandb needs its package: pip install"):
        require_loggers(["csv", "wandb"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("comet", "there is no logger 'comet'; known are"), ("wandb", "pip install wandb")],
)
def test_the_command_says_so_before_anything_is_written(tmp_path, capsys, monkeypatch, name, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command(["compare", "--loggers", name, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def probed(writer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with nk.Probe(model, every=2, writer=writer) as probe:
        for _ in range(4):
            loss = model(torch.randn(4, 1, 6, 6)).square().mean()
            loss.backward()
            probe.step(loss)
    return probe.records


def test_a_probe_writes_to_the_same_logger(spec, tmp_path):
    logger = Logger("csv", tmp_path, spec)
    records = probed(logger)
    logger.log_metrics({"train_loss": 1.0}, 5)  # it is still open
    logger.end()
    path = tmp_path / spec.file_name / "metrics.csv"
    *of_probe, last = rows(path)
    assert last == {"train_loss": 1.0, "step": 5}
    assert [row["normkit/loss"] for row in of_probe] == [record.loss for record in records]


def test_a_probe_writes_to_a_logger_of_fabric(tmp_path):
    records = probed(CSVLogger(str(tmp_path), "run", version=""))
    found = rows(tmp_path / "run" / "metrics.csv")  # saved when the probe was closed
    assert [row["step"] for row in found] == [2, 4]
    assert [row["normkit/loss"] for row in found] == [record.loss for record in records]
    shifts = [record.layers[1].shift_std for record in records]
    assert [row["normkit/shift_std/1"] for row in found] == shifts
