"""The page on other libraries is its record, and what can be measured here is measured again."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "others.md"
RECORD = json.loads((ROOT / "docs" / "records" / "others.json").read_text())["values"]
HERE = [n for n, v in RECORD.items() if v["library"] in ("torch", "torchvision", "timm")]
BY_PROCESSES = "synchronized_on_the_cpu"  # tests/distributed tries that on ours


@pytest.fixture(scope="module")
def programs():
    """The program that measures, and the one that makes the page."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]
    try:
        yield importlib.import_module("others"), importlib.import_module("update_others")
    finally:
        sys.path[:] = before


def test_the_page_is_the_record(programs):
    page = PAGE.read_text()
    assert page.count("<!-- begin others#") == 2
    assert programs[1].updated(page) == page


def test_every_row_has_a_measure_and_every_measure_a_row(programs):
    others, update = programs
    assert [row.measure for row in update.ROWS] == list(
        dict.fromkeys(r.measure for r in update.ROWS)
    )
    assert {row.measure for row in update.ROWS} == set(others.MEASURES) == set(RECORD)


@pytest.mark.parametrize("name", [name for name in HERE if name != BY_PROCESSES])
def test_what_is_installed_here_still_does_what_the_page_says(programs, name):
    others, update = programs
    register_missing_operators()
    torch.manual_seed(0)
    found = others.MEASURES[name][1]()
    for key, value in found.items():
        assert is_alike(value, RECORD[name][key]), key
    (row,) = (row for row in update.ROWS if row.measure == name)
    assert row.differs(found)


def is_alike(value, expected):
    """Whether words, counts and answers are equal, and errors of one size."""
    if isinstance(value, list):
        return all(map(is_alike, value, expected))
    if isinstance(value, float):
        return value == expected or expected / 10 < value < expected * 10
    return value == expected


UNMEASURED = re.findall(
    r"^\| (?:apex|detectron2) \| .* \| (.*) \|$", PAGE.read_text(), re.MULTILINE
)


@pytest.mark.parametrize("ours", UNMEASURED)
def test_our_calls_for_what_was_not_measured_work(ours):
    (call, *_) = re.findall(r"`(nk\.[^`]*)`", ours)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.BatchNorm2d(64))
    found = eval(call, {"nk": nk, "model": model})
    if "residual=" in ours:
        x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
        assert found(x, residual=x).is_contiguous(memory_format=torch.channels_last)


def test_frozen_statistics_leave_the_scales_trainable():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    nk.freeze_statistics(model)
    assert len(UNMEASURED) == 5
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE.read_text()))
def test_every_link_leads_somewhere(link):
    assert (PAGE.parent / link).exists()
