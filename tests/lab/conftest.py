import pytest

from normkit.lab.environment import Environment
from normkit.lab.models import PlacedNorm
from normkit.lab.records import Epoch, Outcome, TrainingRecord
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec

TINY = Protocol(model="mlp:depth=2:width=8", limit=40, epochs=1)


@pytest.fixture(autouse=True)
def own_folder_of_genotypes(tmp_path_factory, monkeypatch):
    """Keep what a test searches for out of the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "searched"
    monkeypatch.setenv("NORMKIT_SEARCHED", str(folder))


@pytest.fixture
def protocol():
    """A protocol whose runs take a few milliseconds."""
    return TINY


@pytest.fixture
def sweep():
    return SweepSpec(protocol=TINY, norms=("bn", "ln"), batch_sizes=(10, 20), seeds=(1, 2))


@pytest.fixture
def record():
    """Make a record without running anything."""

    def make(norm="bn", batch_size=10, seed=1, accuracy=0.5, protocol=TINY, **outcome):
        epoch = Epoch(
            learning_rate=0.1,
            train_loss=1.0,
            train_accuracy=0.4,
            validation_scores={"accuracy": 0.45, "loss": 1.1},
            test_scores={} if accuracy is None else {"accuracy": accuracy},
        )
        given = {
            "status": "finished",
            "epochs": (epoch,),
            "scores": {} if accuracy is None else {"accuracy": accuracy},
            "norms": (PlacedNorm(name="2", norm=norm, num_features=8, num_positions=1),),
            "peak_bytes": 1000,
        }
        return TrainingRecord(
            spec=TrainingSpec(protocol=protocol, norm=norm, batch_size=batch_size, seed=seed),
            outcome=Outcome(**(given | outcome)),
            step_time_s=0.001,
            duration_s=0.1,
            environment=Environment(
                torch="2", python="3", platform="p", device="cpu", threads=1, date="2026-01-01"
            ),
            code_hash="0" * 12,
        )

    return make
