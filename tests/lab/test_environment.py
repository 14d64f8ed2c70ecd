from pathlib import Path

import pytest
import torch

import normkit as nk
from normkit.kernels.select import use_kernels
from normkit.lab import environment
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.records import TrainingRecord

KEPT = Path(__file__).parents[2] / "docs" / "records"


@pytest.mark.parametrize("name", ["compare-digits.jsonl", "compare-fashion-mnist.jsonl"])
def test_kept_records_still_load(name):
    for line in (KEPT / name).read_text().splitlines():
        assert TrainingRecord.model_validate_json(line).outcome.status == "finished"


def test_the_environment_names_the_kernels_that_compute_and_the_version():
    with use_kernels("reference"):
        described = describe_environment(torch.device("cpu"), 1)
    assert (described.kernels, described.normkit) == ("reference", nk.__version__)
    assert describe_environment(torch.device("cpu"), 1).kernels.split()[0] in ("cpu", "reference")


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("core/a.py", True),
        ("kernels/cpu/_C.so", True),
        ("client.py", True),  # begins like a folder that is left out
        ("cli/a.py", False),
        ("lab/bench/a.py", False),
        ("lab/report/a.py", False),
        ("lab/reproduce/a.py", False),
        ("lab/reproduce/tasks/a.py", False),
    ],
)
def test_the_code_hash_covers_what_decides_a_run(tmp_path, monkeypatch, name, matters):
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    before = code_hash.__wrapped__()
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"anything")
    assert (code_hash.__wrapped__() != before) == matters


def test_runs_of_presets_depend_on_their_tasks_and_not_on_what_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    hashes = [code_hash.__wrapped__("lab/reproduce/tasks/")]
    for name in ("lab/reproduce/claims.py", "lab/reproduce/tasks/noise.py", "lab/loop.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"anything")
        hashes.append(code_hash.__wrapped__("lab/reproduce/tasks/"))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
