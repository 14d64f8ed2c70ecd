import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from normkit.errors import DataError, SpecError
from normkit.lab import sweep as sweep_module
from normkit.lab.check import check, num_steps
from normkit.lab.data import open_data
from normkit.lab.data.sharing import LARGE_BYTES
from normkit.lab.records import TrainingRecord, missing_runs, read_records
from normkit.lab.spec import Protocol, SweepSpec
from normkit.lab.sweep import run_all
from normkit.lab.train import TRAINING
from pictures import fill


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self):
        self.records, self.steps = [], 0

    def on_steps(self, spec, num_steps):
        """Add the steps up."""
        self.steps += num_steps

    def on_record(self, record):
        """Keep the record."""
        self.records.append(record)


def test_records_are_on_the_disk_before_they_are_told_of(sweep, tmp_path):
    class Checking(Notes):
        def on_record(self, record):
            assert read_records(tmp_path, TrainingRecord).records[-1] == record
            super().on_record(record)

    notes = Checking()
    run_all(sweep.runs(), tmp_path, 1, notes, TRAINING)
    assert len(notes.records) == 8


def test_finished_and_diverged_runs_are_not_missing_but_failed_ones_are(sweep, record):
    records = [
        record(),
        record(seed=2, status="diverged"),
        record("ln", status="failed"),
    ]
    missing = missing_runs(sweep.runs(), records)
    assert len(missing) == 6
    assert records[2].spec in missing


def test_workers_give_the_outcomes_that_this_process_gives(sweep, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, num_workers in ((here, 1), (there, 2)):
        folder.mkdir()
        run_all(sweep.runs()[:4], folder, num_workers, Notes(), TRAINING)
    outcomes = [
        {r.spec.key: r.outcome for r in read_records(folder, TrainingRecord).records}
        for folder in (here, there)
    ]
    assert len(outcomes[0]) == 4
    assert outcomes[0] == outcomes[1]


READS_THE_ENVIRONMENT = """
import os
from torch import nn

def train(apply_norm, batch_size, seed, report):
    apply_norm(nn.BatchNorm1d(4))
    return float(os.environ["ANSWER"])
"""


def test_workers_have_the_environment_of_now(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(READS_THE_ENVIRONMENT)
    protocol = Protocol(train=f"{tmp_path / 'own.py'}:train")
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(2,), seeds=(1, 2))
    for answer in ("1", "2"):  # the workers of both are forked from one process
        folder = tmp_path / answer
        folder.mkdir()
        monkeypatch.setenv("ANSWER", answer)
        run_all(sweep.runs(), folder, 2, notes := Notes(), TRAINING)
        assert [r.score for r in notes.records] == [float(answer)] * 2


def test_workers_have_the_pictures_that_this_process_has_read(tmp_path):
    """They map one copy; the folder itself is gone meanwhile."""
    fill(tmp_path / "photos", per_class=100, size=(64, 64))
    protocol = Protocol(data=f"folder:{tmp_path / 'photos'}", model="mlp:depth=2:width=8", epochs=1)
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(8,), seeds=(1, 2))
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    run_all(sweep.runs(), here, 1, Notes(), TRAINING)
    assert open_data(protocol.data).train.values.nbytes > LARGE_BYTES
    shutil.rmtree(tmp_path / "photos")
    run_all(sweep.runs(), there, 2, Notes(), TRAINING)
    one, other = (read_records(folder, TrainingRecord).records for folder in (here, there))
    ends = [{r.spec.key: (r.outcome, r.data_hash) for r in records} for records in (one, other)]
    assert ends[0] == ends[1]
    assert {r.outcome.status for r in other} == {"finished"}
    assert [path.name for path in there.iterdir()] == ["records.jsonl"]


def test_a_worker_that_dies_is_a_failed_run_and_the_others_go_on(sweep, tmp_path):
    class Killing(Notes):
        def on_steps(self, spec, num_steps):
            if spec == slow and not self.steps:
                for worker in sweep_module.multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGKILL)
            super().on_steps(spec, num_steps)

    many = sweep.protocol.model_copy(update={"epochs": 10**6})
    slow = sweep.runs()[0].model_copy(update={"protocol": many})
    notes = Killing()
    run_all([slow, slow, sweep.runs()[1]], tmp_path, 2, notes, TRAINING)
    assert [r.outcome.status for r in notes.records] == ["failed", "failed", "finished"]
    assert "the worker process ended with exit code -9" in notes.records[0].outcome.message


def test_the_expected_steps_are_the_steps_that_are_done(sweep, tmp_path):
    run_all(sweep.runs()[:1], tmp_path, 1, Notes(), TRAINING)
    done = read_records(tmp_path, TrainingRecord).records[0].outcome.num_steps
    assert num_steps(sweep.runs()[0], len(check(sweep).train)) == done == 4


SWEEP_SCRIPT = """
import sys
from pathlib import Path
from normkit.lab.records import TrainingRecord, missing_runs, read_records
from normkit.lab.spec import Protocol, SweepSpec
from normkit.lab.sweep import run_all
from normkit.lab.train import TRAINING

class Silent:
    def on_steps(self, spec, num_steps): pass
    def on_record(self, record): print("record", flush=True)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    protocol = Protocol(model="mlp:depth=2:width=8", limit=100, epochs=2)
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(2,), seeds=tuple(range(6)))
    missing = missing_runs(sweep.runs(), read_records(folder, TrainingRecord).records)
    print("missing", len(missing), flush=True)
    run_all(missing, folder, int(sys.argv[2]), Silent(), TRAINING)
"""


def start_sweep(tmp_path, num_workers):
    script = tmp_path / "script.py"
    script.write_text(SWEEP_SCRIPT)
    return subprocess.Popen(
        [sys.executable, script, tmp_path, str(num_workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(pid):
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, check=False
    )
    return [int(child) for child in listing.stdout.split()]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_sweep_loses_only_what_was_in_flight(tmp_path):
    first = start_sweep(tmp_path, 2)
    assert first.stdout.readline() == "missing 6\n"
    for _ in range(2):
        assert first.stdout.readline() == "record\n", first.stderr.read()
    children = children_of(first.pid)
    first.kill()
    first.communicate()
    kept = len(read_records(tmp_path, TrainingRecord).records)
    assert 2 <= kept < 6
    again = start_sweep(tmp_path, 1)
    output, errors = again.communicate()
    assert output.splitlines() == [f"missing {6 - kept}"] + ["record"] * (6 - kept), errors
    keys = [record.spec.key for record in read_records(tmp_path, TrainingRecord).records]
    assert len(keys) == len(set(keys)) == 6
    deadline = time.monotonic() + 20
    while any(map(is_alive, children)):  # workers notice that their parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": "nope"}, SpecError, r"no model 'nope'"),
        ({"data": "nope"}, SpecError, r"no data set 'nope'; known are digits"),
        ({"device": "nope"}, SpecError, r"no device 'nope' here"),
        ({"model": "timm:vit_tiny_patch16_224"}, SpecError, r"cannot take inputs|no batch norm"),
    ],
)
def test_bad_input_is_found_before_the_first_run(sweep, change, error, text):
    changed = sweep.protocol.model_copy(update=change)
    with pytest.raises(error, match=text):
        check(sweep.model_copy(update={"protocol": changed}))


def test_missing_data_files_are_found_before_the_first_run(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr("normkit.lab.data.sources.FASHION_MNIST_FOLDER", tmp_path)
    changed = sweep.protocol.model_copy(update={"data": "fashion-mnist"})
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz cannot be read"):
        check(sweep.model_copy(update={"protocol": changed}))


@pytest.mark.parametrize("delay", [0.3, 8])
def test_an_interrupt_while_workers_start_shows_no_traceback(tmp_path, delay):
    num_workers = 2
    options = ["--model", "mlp:depth=2:width=8", "--norms", "bn,ln", "--epochs", "1000"]
    options += ["--workers", str(num_workers), "--out", str(tmp_path)]
    program = subprocess.Popen(
        [sys.executable, "-m", "normkit.cli", "compare", *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(children_of(program.pid)) < 2:  # multiprocessing's tracker and the fork server
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(delay)  # in the middle of importing torch, or of the runs
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=240)
    assert program.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted; finished runs are kept" in errors


def test_a_learning_rate_that_is_no_update_rate_is_found_before_the_first_run(sweep):
    changed = sweep.protocol.model_copy(update={"base_lr": 10.0})
    norms = sweep.model_copy(update={"protocol": changed, "norms": ("bcn:2:micro",)})
    with pytest.raises(
        SpecError, match=r"update rate, which is 1.5625 at batch size 20, and above"
    ):
        check(norms)
    check(norms.model_copy(update={"norms": ("bcn:2:micro:rate=0.1", "bcn:2")}))
