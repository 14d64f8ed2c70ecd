"""The figures of GPUs in the pages are those of the record; the pages name the files that exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRITON = (ROOT / "docs" / "triton.md").read_text()
README = (ROOT / "README.md").read_text()
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))


@pytest.fixture
def report():
    return importlib.import_module("gpu_report")


@pytest.mark.parametrize("page", [TRITON, README], ids=["triton.md", "README"])
def test_the_tables_are_those_of_the_records(page):
    update_docs = importlib.import_module("update_docs")
    assert "#largest_steps -->" in page
    assert update_docs.rewritten(page) == page


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_it_was_measured_with_and_reads_as_it_was_written(
    path, report, tmp_path
):
    record = report.read(path)
    assert not record["environment"]["pretends"]
    for known in ("device", "driver", "torch", "triton", "date", "commit"):
        assert record["environment"][known]
    report.write(record, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert max(map(len, path.read_text().splitlines())) < 1500
    assert report.markdown(record).count("| ---") > 4


def test_figures_in_sentences_are_those_of_the_first_record(report):
    steps = {
        (row["norm"], row["whose"]): row
        for row in report.read(RECORDS[0])["steps"]
        if row["batch_size"] == 128
    }
    for whose in ("ours", "torch"):
        assert f"{steps['group', whose]['peak_mib']} MiB" in TRITON
        assert f"{steps['group', whose]['step_ms']:.1f}" in TRITON


def row(norm, by, torch, ours, batch_size=32):
    us = {"torch": torch, "ours": ours}
    return {"norm": norm, "shape": [batch_size, 8, 2, 2], "dtype": "float32", "layout": "NCHW",
            "by": by, "us": us}  # fmt: skip


def test_ratios_are_geometric_means_with_the_slowest_and_bold_where_they_miss(report):
    rows = [row("gn", "calls", 4.0, 1.0), row("gn", "calls", 1.0, 1.0), row("bn", "calls", 1, 2)]
    lines = report.layers({"layers": rows}).splitlines()
    assert lines[2] == "| `gn` | 32 | float32 | NCHW | 1.3 | 2.00 (1.00) |"
    assert lines[3] == "| `bn` | 32 | float32 | NCHW | 1.0 | **0.50** (0.50) |"
    assert lines[0].endswith("| wanted | called |")  # no column for what was not measured


@pytest.mark.parametrize(
    ("norm", "way", "batch_size", "ours_ms", "cell"),
    [
        ("batch", "eager", 2, 10.9, "0.92"), ("batch", "eager", 2, 11.1, "**0.90**"),
        ("batch", "eager", 128, 9.8, "**1.02**"), ("group", "eager", 32, 8.4, "1.19"),
        ("batch", "compiled", 32, 10.0, "1.00"), ("group", "compiled", 32, 9.5, "**1.05**"),
    ],
)  # fmt: skip
def test_steps_are_bold_where_they_miss_their_target(norm, way, batch_size, ours_ms, cell, report):
    common = {"norm": norm, "way": way, "batch_size": batch_size}
    times = {"torch": 10.0, "ours": ours_ms}
    rows = [{**common, "whose": whose, "step_ms": ms} for whose, ms in times.items()]
    assert report.steps({"steps": rows}).splitlines()[2].split(" | ")[4] == cell


def test_a_step_without_a_counterpart_has_dashes(report):
    step = {"norm": "group", "way": "compiled", "batch_size": 2, "whose": "ours", "step_ms": 3.21}
    assert "| group norm, compiled | 2 | - | 3.2 | - | - | - |" in report.steps({"steps": [step]})


def test_fused_steps_stand_beside_torchs_bold_where_they_miss(report):
    rows = [
        {"whose": whose, "way": way, "batch_size": 128, "step_ms": ms, "peak_mib": 7}
        for way, whose, ms in (
            ("eager", "torch", 10.0), ("eager", "fused", 9.5), ("compiled", "fused", 5.0),
        )
    ]  # fmt: skip
    lines = report.fused({"fused": rows}).splitlines()
    assert lines[2] == "| eager | 128 | 10.0 | - | 9.5 | **1.05** | 7 | - | 7 |"
    assert lines[3] == "| compiled | 128 | - | - | 5.0 | - | - | - | 7 |"
    assert "not measured" in report.fused({})


def test_triton_md_lists_every_file_of_the_kernels():
    listed = re.findall(
        r"`([\w.]+\.py)`", TRITON.split("## The files and how they work")[1].split("\n- **")[0]
    )
    there = {path.name for path in (ROOT / "src/normkit/kernels/triton").glob("*.py")}
    assert set(listed) == there - {"__init__.py"}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "docs/triton.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`([\w/.-]+?(?:\.(?:py|cpp|md|toml)|/))`", text)
    tracked = [
        path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
        for top in ("src", "tests", "csrc", "docs", "benchmarks")
        for path in [ROOT / top, *(ROOT / top).rglob("*")]
    ] + [path.name for path in ROOT.iterdir()]
    for name in named:
        assert any(f"/{path}".endswith(f"/{name}") for path in tracked), name
