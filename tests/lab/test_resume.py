"""A run that was killed goes on from its checkpoint, and ends as one that was not."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from killing import Killed, killed_after
from normkit.cli import main
from normkit.lab.records import TrainingRecord, read_records
from normkit.lab.resume import Checkpoint
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import run
from normkit.lab.work import Upkeep
from pictures import fill

PROTOCOLS = {
    "sgd": Protocol(model="small-resnet:width=4", limit=60, epochs=3),
    "adam, dropout, mixup, augmented, bf16": Protocol(
        model="timm:mobilenetv3_small_050", limit=40, epochs=2, optimizer="adamw", base_lr=1e-3,
        schedule="cosine", accumulate=2, clip=1.0, mixup=0.2, augment=("crop", "flip"),
        precision="bf16-mixed", norm_weight_decay=0.0,
    ),
    "micro-batches": Protocol(model="small-resnet:width=4", limit=60, epochs=2, steps=None),
}  # fmt: skip
NORMS = {"micro-batches": "bcn:4:micro"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_killed_run_goes_on_bit_for_bit(name, tmp_path):
    spec = TrainingSpec(protocol=PROTOCOLS[name], norm=NORMS.get(name, "bn"), batch_size=8, seed=3)
    expected = run(spec)
    assert expected.outcome.status == "finished", expected.outcome.message
    num_steps = expected.outcome.num_steps
    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    moments = random.Random(0).sample(range(1, num_steps), min(4, num_steps - 1))
    done = 0
    for moment in sorted(moments):
        random.seed(time.time_ns())
        np.random.seed(time.time_ns() % 2**32)  # noqa: NPY002 - what a user's code would draw from
        with pytest.raises(Killed):
            run(spec, killed_after(moment - done + 1), upkeep)
        done = moment
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert run(spec, upkeep=upkeep).outcome == expected.outcome
    assert not (tmp_path / "checkpoints").exists()


def test_the_scale_of_float16_gradients_comes_back(tmp_path, monkeypatch):
    """On a CPU, where the lab refuses that precision and Fabric takes it as a plugin."""
    from lightning_fabric import Fabric  # slow to import
    from lightning_fabric.plugins.precision import MixedPrecision

    def scaling(_protocol, _device):
        return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu"))

    monkeypatch.setattr("normkit.lab.loop.make_fabric", scaling)
    protocol = Protocol(
        model="mlp:depth=2:width=8", limit=40, epochs=2, precision="16-mixed", clip=1.0
    )
    spec = TrainingSpec(protocol=protocol, norm="bn", batch_size=8, seed=3)
    for num_steps, so_far in ((4, 3), (3, 5)):  # killed in the last one, before it is written
        with pytest.raises(Killed):
            run(spec, killed_after(num_steps), Upkeep(folder=tmp_path, checkpoint_seconds=0))
        with safe_open(next((tmp_path / "checkpoints").iterdir()), "pt") as file:
            scaler = json.loads(file.metadata()["about"])["scaler"]
        assert scaler["_growth_tracker"] == so_far  # steps without an overflow


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    spec = TrainingSpec(protocol=PROTOCOLS["sgd"], norm="bn", batch_size=8)
    with pytest.raises(Killed):
        run(spec, killed_after(3), Upkeep(folder=tmp_path, checkpoint_seconds=0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("content", [b"", b"broken", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_broken_checkpoint_is_as_none(content, tmp_path):
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    path = tmp_path / "x.safetensors"
    assert Checkpoint(path).read(net, optimizer) is None
    path.write_bytes(content)
    assert Checkpoint(path).read(net, optimizer) is None
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_every_random_state_comes_back(tmp_path):
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002 - the global state, with half a pair kept
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    checkpoint.write(net, optimizer, {"a": [1, None]}, {"seen": torch.tensor([3, 4])})

    def draws():
        return (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(),  # noqa: NPY002
                torch.rand(3).tolist())  # fmt: skip

    expected = draws()
    saved = checkpoint.read(net, optimizer)
    assert saved.about == {"a": [1, None]}
    assert saved.extra["seen"].tolist() == [3, 4]
    assert draws() == expected


MY = """
import timm
from torch import nn


def make_model(num_classes):
    body = timm.create_model("test_resnet", num_classes=0)
    channels = body.num_features
    return nn.Sequential(body, nn.BatchNorm1d(channels), nn.Linear(channels, num_classes))
"""
KILLED = [
    "compare", "--model", "my.py:make_model", "--data", "folder:photos", "--epochs", "6",
    "--norms", "bn,gn:8", "--batch-sizes", "8", "--seeds", "1", "--precision", "bf16-mixed",
    "--accumulate", "2", "--schedule", "cosine", "--augment", "flip", "--json", "--workers", "1",
    "--checkpoint-seconds", "0.1", "--out",
]  # fmt: skip


def newest(folder):
    """When the newest checkpoint was written; 0 for none."""
    try:
        return max((path.stat().st_mtime_ns for path in folder.glob("*.safetensors")), default=0)
    except FileNotFoundError:  # it has been replaced since
        return newest(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_leaves_the_same_records(tmp_path, monkeypatch, capsys):
    """The program on a user's network and pictures, killed while it trains, twice; then let end.

    ``benchmarks/killed.py`` does the same at twenty moments.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(MY)
    fill(tmp_path / "photos", per_class=50, size=(32, 32))
    folder, moments = tmp_path / "killed" / "checkpoints", random.Random(1)
    for _ in range(2):
        before, deadline = newest(folder), time.monotonic() + 100
        process = subprocess.Popen(
            [sys.executable, "-m", "normkit", *KILLED, "killed"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while newest(folder) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        assert newest(folder) > before, "it was killed before its first checkpoint"
    assert main([*KILLED, "killed"]) == main([*KILLED, "whole"]) == 0
    capsys.readouterr()
    found, expected = (
        {r.spec.key: r.outcome for r in read_records(tmp_path / name, TrainingRecord).records}
        for name in ("killed", "whole")
    )
    assert found == expected
    assert len(found) == 2
