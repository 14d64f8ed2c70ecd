"""A run of each task that was killed goes on from its checkpoint, bit for bit."""

import subprocess
import sys

import pytest

from killing import Killed, killed_after
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import run
from normkit.lab.work import Upkeep

SCENES = "scenes:items=digits:side=32:most=2:smallest=40:largest=70:test=2"
RESNET = "small-resnet:width=4:blocks=1:stages=3"
HEADS = "channels=8:hidden=16:anchor=4:proposals=20:rois=8:detections=5"
PROTOCOLS = {
    "detection": Protocol(
        task=f"instance-segmentation:norms=fpn+heads:pretrain=1:{HEADS}", data=SCENES,
        model=RESNET, limit=6, epochs=2, base_lr=0.01, clip=5.0, augment=("flip",),
    ),
    "segmentation": Protocol(
        task="segmentation:stride=8:rate=1:channels=8:pretrain=1", data=SCENES, model=RESNET,
        limit=6, epochs=2, base_lr=0.01, augment=("crop", "flip"),
    ),
    "video": Protocol(
        task="video:frames=3", data="clips:items=digits:side=20:test=4", limit=6, epochs=2,
        model="small-resnet:width=8:blocks=1:stages=2", augment=("crop",),
    ),
    "adversarial": Protocol(
        task="adversarial:steps=2:statistics=both:clean_share=0.5", limit=40, epochs=2,
        model="small-resnet:width=4:stages=1",
    ),
    "few-shot": Protocol(
        task="few-shot:episodes=4", model="small-resnet:width=4:blocks=1:stages=2", limit=40,
        epochs=2,
    ),
    "domain-adaptation": Protocol(
        task="domain-adaptation:target=rotated:source_epochs=1:head_rate=2", limit=60, epochs=3,
        model="small-resnet:width=4:stages=1", optimizer="adam", base_lr=3e-3,
    ),
    "search": Protocol(
        task="search:search_epochs=1:search_cells=1:search_channels=2:rate=0.1", limit=32,
        model="darts:cells=3:channels=2", epochs=2, drop_path=0.2,
    ),
}  # fmt: skip
SIZES = {"detection": 2, "segmentation": 2, "video": 2, "domain-adaptation": 12}


@pytest.fixture(autouse=True)
def searched(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_SEARCHED", str(tmp_path / "searched"))


def spec_of(name):
    size = SIZES.get(name, 8)
    return TrainingSpec(protocol=PROTOCOLS[name], norm="bn", batch_size=size, seed=3)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_killed_run_goes_on_bit_for_bit(name, tmp_path):
    spec = spec_of(name)
    expected = run(spec).outcome
    assert expected.status == "finished", expected.message
    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    last = expected.num_steps - 1
    assert last > 2
    for moment in (2, last - 1):  # the second one counts from the checkpoint before the first
        with pytest.raises(Killed):
            run(spec, killed_after(moment), upkeep)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert run(spec, upkeep=upkeep).outcome == expected
    assert not (tmp_path / "checkpoints").exists()


KILLING = """
import os, signal, sys
from pathlib import Path
from normkit.lab.spec import TrainingSpec
from normkit.lab.train import run
from normkit.lab.work import Upkeep

steps = iter(range(4))
def on_step():
    if next(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

spec = TrainingSpec.model_validate_json(sys.argv[1])
run(spec, on_step, Upkeep(folder=Path(sys.argv[2]), checkpoint_seconds=0))
"""


def test_a_run_whose_process_is_killed_goes_on_bit_for_bit(tmp_path):
    spec = spec_of("segmentation")
    given = [sys.executable, "-c", KILLING, spec.model_dump_json(), str(tmp_path)]
    done = subprocess.run(given, capture_output=True, timeout=250, check=False)
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    expected, calls = run(spec).outcome, []
    upkeep = Upkeep(folder=tmp_path, checkpoint_seconds=0)
    assert run(spec, lambda: calls.append(1), upkeep).outcome == expected
    assert len(calls) == expected.num_steps - 3
