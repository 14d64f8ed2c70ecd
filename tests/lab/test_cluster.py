"""Runs on a Ray cluster: two nodes on this machine, of which one is killed."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from normkit.cli.app import run as command
from normkit.errors import DataError, SpecError
from normkit.lab.cluster import _done, _resources, run_on_ray
from normkit.lab.environment import code_hash
from normkit.lab.experiment import Silent
from normkit.lab.records import TrainingRecord, read_records
from normkit.lab.reproduce import find_preset, run_missing
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.sweep import run_all
from normkit.lab.train import TRAINING
from normkit.lab.work import RunOptions, Upkeep, Way

pytestmark = [
    pytest.mark.xdist_group("ray"),
    # Of Ray's own: what it leaves to the garbage collector, and a default that will change.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TINY = ["compare", "--norms", "bn,ln", "--batch-sizes", "10", "--seeds", "1,2", "--limit", "40"]
TINY += ["--epochs", "1"]
MEMORY = 80 * 2**20  # bytes for objects of a node, about the least that Ray takes

# Each node's first run says who it is, and waits until the test has killed one of the nodes.
NETWORK = """
import os, time
from pathlib import Path
from torch import nn

def make():
    here = Path(__file__).parent
    if not (here / "go").exists() and (here / "wait").exists():
        (here / f"node-{os.getppid()}").touch()
        while not (here / "go").exists():
            time.sleep(0.05)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
"""


class Told(Silent):
    """A watcher that keeps what it is told."""

    def __init__(self):
        self.keys = []

    def on_record(self, record):
        self.keys.append(record.spec.key)


@pytest.fixture(scope="module")
def nodes():
    """A cluster's address, and its two nodes with a CPU each; the head has none."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster  # it may not be there

    head = {"num_cpus": 0, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    workers = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    yield cluster, workers
    cluster.shutdown()


@pytest.fixture
def cluster(nodes, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", nodes[0].address)
    return nodes


class KillsANode(Thread):
    """Waits until both nodes are at work, then removes one without a word and lets runs go on."""

    def __init__(self, cluster, node, folder):
        super().__init__(daemon=True)
        self.cluster, self.node, self.folder, self.num_waiting = cluster, node, folder, 0

    def run(self):
        end = time.monotonic() + 60
        while self.num_waiting < 2 and time.monotonic() < end:
            self.num_waiting = len(list(self.folder.glob("node-*")))
            time.sleep(0.05)
        self.cluster.remove_node(self.node, allow_graceful=False)
        (self.folder / "go").touch()


def outcomes(folder):
    found = read_records(folder, TrainingRecord).records
    return {record.spec.key: record.outcome for record in found}


def specs_of(model, seeds):
    protocol = Protocol(model=model, limit=40, epochs=1)
    return [
        TrainingSpec(protocol=protocol, norm=norm, batch_size=10, seed=seed)
        for seed in seeds
        for norm in ("bn", "ln")
    ]


def test_the_same_command_gives_the_same_records(cluster, tmp_path, capfd):
    given = [*TINY, "--model", "mlp:depth=2:width=8"]
    assert command([*given, "--workers", "1", "--out", str(tmp_path / "home")]) == 0
    assert command([*given, "--cluster", "ray", "--out", str(tmp_path / "away")]) == 0
    assert outcomes(tmp_path / "home") == outcomes(tmp_path / "away")
    assert len(outcomes(tmp_path / "away")) == 4
    assert "ray" not in capfd.readouterr().err.replace(str(tmp_path), "").lower()


def test_presets_have_the_same_values_there(cluster, tmp_path):
    preset, found = find_preset("gnbn"), []
    for name, where in (("home", None), ("away", "ray")):
        folder = tmp_path / name
        folder.mkdir()
        way = Way(out=folder, num_workers=1, upkeep=Upkeep(folder=folder), cluster=where)
        records = run_missing(preset, "tiny", folder, way=way)
        found.append([(record.spec, record.values) for record in records])
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_a_machine_with_another_version_of_normkit_is_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("normkit.lab.cluster.code_hash", lambda: f"not {code_hash()}")
    with pytest.raises(DataError, match=r"has another version of normkit; install the same one"):
        run_on_ray(
            specs_of("mlp:depth=2:width=8", (1,)), Upkeep(folder=tmp_path), Silent(), TRAINING
        )
    assert outcomes(tmp_path) == {}


def test_runs_of_a_node_that_is_killed_are_done_elsewhere(cluster, tmp_path, monkeypatch):
    """With a network of the user's own."""
    ray_cluster, workers = cluster
    file = tmp_path / "mine.py"
    file.write_text(NETWORK)
    specs = specs_of(f"{file}:make", (1, 2, 3))
    (tmp_path / "home").mkdir()
    run_all(specs, tmp_path / "home", 1, Silent(), TRAINING)
    (tmp_path / "wait").touch()
    killer = KillsANode(ray_cluster, workers[1], tmp_path)
    killer.start()
    told = Told()
    (tmp_path / "away").mkdir()
    run_on_ray(specs, Upkeep(folder=tmp_path / "away"), told, TRAINING)
    killer.join()
    assert killer.num_waiting == 2  # one of them was on the node that died
    assert sorted(told.keys) == sorted(spec.key for spec in specs)
    assert outcomes(tmp_path / "away") == outcomes(tmp_path / "home")


DYING = """
import os, signal
from pathlib import Path
from torch import nn


class Net(nn.Sequential):
    def forward(self, x):
        here = Path(__file__).parent
        if self.training and len(x) == 10:
            with (here / "steps").open("a") as file:
                file.write(".")
            if (here / "steps").stat().st_size == 9 and not (here / "home").exists():
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def make():
    return Net(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
"""


def test_a_run_whose_process_is_killed_goes_on_from_its_checkpoint(cluster, tmp_path):
    file, steps = tmp_path / "dying.py", tmp_path / "steps"
    file.write_text(DYING)
    protocol = Protocol(model=f"{file}:make", limit=100, epochs=2)
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=10, seed=1)
    (tmp_path / "away").mkdir()
    upkeep = Upkeep(folder=tmp_path / "away", checkpoint_seconds=0)
    run_on_ray([spec], upkeep, Silent(), TRAINING)
    num_away = steps.stat().st_size
    steps.unlink()
    (tmp_path / "home").mkdir()
    run_all([spec], tmp_path / "home", 1, Silent(), TRAINING)
    # Killed in its 9th forward. The second try measures memory and looks at the model once more,
    # but repeats the step of that forward alone.
    num_home = steps.stat().st_size
    assert num_home == 20 + 2
    assert num_away < num_home + 9
    assert outcomes(tmp_path / "away") == outcomes(tmp_path / "home")
    assert [path.name for path in (tmp_path / "away").iterdir()] == ["records.jsonl"]


def test_a_machine_without_the_folder_keeps_no_checkpoints(tmp_path):
    seen = []
    work = replace(TRAINING, run=lambda _spec, _tell, upkeep: seen.append(upkeep.folder))
    for mark in (tmp_path / "here", tmp_path / "elsewhere" / "not"):
        (tmp_path / "here").touch()
        _done(None, work, Upkeep(folder=Path("relative")), code_hash(), mark)
    assert seen == [tmp_path, None]


@pytest.mark.parametrize(("device", "num_gpus"), [("cpu", 0), ("cuda", 1), ("cuda:1", 1)])
def test_a_task_takes_the_threads_and_the_gpu_of_its_run(device, num_gpus):
    protocol = Protocol(model="mlp", device=device, threads=3)
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=10, seed=1)
    assert _resources(spec) == {"num_cpus": 3, "num_gpus": num_gpus}


UNREACHABLE = "127.0.0.1:1"


def test_a_cluster_that_cannot_be_reached_is_said_in_a_sentence(tmp_path, monkeypatch, capfd):
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", UNREACHABLE)
    out = tmp_path / "out"
    assert command([*TINY, "--cluster", "ray", "--out", str(out)]) == 2
    errors = capfd.readouterr().err
    assert f"the Ray cluster at RAY_ADDRESS={UNREACHABLE} cannot be reached (" in errors
    assert "start it by ray start --head, or unset RAY_ADDRESS to use this machine alone" in errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_without_ray_its_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    assert command([*TINY, "--cluster", "ray", "--out", str(out)]) == 2
    assert "--cluster ray needs Ray: pip install 'normkit[cluster]'" in capsys.readouterr().err
    assert not out.exists()


def test_a_cluster_is_started_here_if_there_is_none(tmp_path, monkeypatch, capfd):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run_on_ray(
        specs_of("mlp:depth=2:width=8", (1,)), Upkeep(folder=tmp_path), told := Told(), TRAINING
    )
    assert len(told.keys) == len(outcomes(tmp_path)) == 2
    assert not ray.is_initialized()


def test_what_only_this_process_knows_is_refused(tmp_path):
    specs = specs_of("python:model:make:0123", (1,))
    with pytest.raises(DataError, match=r"known only to this process; define the function at the"):
        run_on_ray(specs, Upkeep(folder=tmp_path), Silent(), TRAINING)


@pytest.mark.parametrize("given", [{"save_weights": True}, {"loggers": ("csv",)}], ids=str)
def test_what_would_stay_on_the_machines_is_refused(given):
    with pytest.raises(SpecError, match=r"--cluster ray, whose machines send home records only"):
        RunOptions(cluster="ray", **given).way()
