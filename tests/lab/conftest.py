import os
import shutil

import pytest

from normkit.lab.environment import Environment
from normkit.lab.models import PlacedNorm
from normkit.lab.records import Epoch, Outcome, TrainingRecord
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec

TINY = Protocol(model="mlp:depth=2:width=8", limit=40, epochs=1)


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


@pytest.fixture(scope="module")
def chromium():
    """A browser; without one these tests fail where it is required, else they are skipped."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = "chromium and chromedriver are not both on the path"
        if os.environ.get("NORMKIT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver  # only where there is a browser to drive

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()
