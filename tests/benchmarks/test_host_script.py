"""The measurement of host time without a GPU, and its record."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the script compiles Triton kernels")
COMPOSITES = {"bcn:32", "bcn:32:micro", "gnplus:32", "sn", "ibn"}
KEYS = {"norm", "shape", "of_torch_cpu", "launches_forward", "launches_backward"}
RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "host.json"


def require_few_launches(rows):
    """Two each way at most, and three for composites."""
    for row in rows:
        assert row.keys() > KEYS
        most = 3 if row["norm"] in COMPOSITES else 2
        assert 1 <= row["launches_forward"] <= most, row
        assert 1 <= row["launches_backward"] <= most, row


def test_the_record_has_every_norm_on_every_shape_with_few_launches():
    host = importlib.import_module("host")
    rows = json.loads(RECORD.read_text())["rows"]
    found = {(row["norm"], tuple(row["shape"])) for row in rows}
    assert found == {(norm, shape) for norm in host.NORMS for shape in host.SHAPES}
    assert set(host.NORMS) > COMPOSITES
    require_few_launches(rows)


@pytest.mark.slow
def test_a_layer_and_a_composite_are_measured(benchmarks, tmp_path):
    out = tmp_path / "host.json"
    options = ["--norms", "bn,bcn:32", "--repeats", "1", "--inner", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, benchmarks / "host.py", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["norm"] for row in rows] == ["bn"] * 3 + ["bcn:32"] * 3
    assert all(row["of_torch_cpu"] > 0 for row in rows)
    require_few_launches(rows)
