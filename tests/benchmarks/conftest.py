"""The programs of ``benchmarks/`` can be imported here."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True, scope="session")
def benchmarks():
    sys.path.insert(0, str(FOLDER))
    yield FOLDER
    sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def quiet_profiler(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # read once a process: others look at stderr
