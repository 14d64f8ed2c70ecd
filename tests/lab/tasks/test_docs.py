"""The pages on tasks say what is so: commands run, options and tables are the real ones."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from normkit.cli import main
from normkit.lab.task import TASKS, parse_task
from pictures import fill

DOCS = Path(__file__).parents[3] / "docs"
NAMES = ("adversarial", "few-shot", "domain-adaptation", "search")
PAGES = {name: DOCS / "tasks" / f"{name}.md" for name in NAMES}
MODEL = """
from torch import nn
def make_model(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def update():
    spec = importlib.util.spec_from_file_location("update_tasks", DOCS / "update_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_task_has_its_page_and_a_row():
    overview = (DOCS / "tasks" / "README.md").read_text()
    for name in PAGES:
        scores = ", ".join(f"`{score}`" for score in parse_task(name).scores)
        assert re.search(rf"\| \[`{name}`\]\({name}.md\) \|.*\| {scores} \|", overview)
    assert set(PAGES) <= set(TASKS)


@pytest.mark.parametrize("path", PAGES.values(), ids=list(PAGES))
def test_the_tables_of_a_page_are_those_of_the_records(path):
    page = path.read_text(encoding="utf-8")
    assert update().updated(page) == page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_every_option(name):
    page = PAGES[name].read_text()
    listed = re.findall(r"^\| (`[a-z_`, ]+`) \|", page.partition("## ")[0], re.MULTILINE)
    found = {option for cell in listed for option in re.findall(r"`(\w+)`", cell)}
    assert found == set(type(parse_task(name)).model_fields)


@pytest.mark.parametrize("name", PAGES)
def test_the_command_with_a_model_and_pictures_of_ones_own_runs(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMKIT_SEARCHED", str(tmp_path / "searched"))
    shown = re.findall(r"```python\n(.*?)```", PAGES[name].read_text(), re.DOTALL)
    (tmp_path / "my.py").write_text("\n".join([MODEL, *shown]))
    for folder in ("photos", "drawings"):
        fill(tmp_path / folder, per_class=30, classes="abcdef")
    commands = re.findall(r"^    normkit (.*my\.py.*)$", PAGES[name].read_text(), re.MULTILINE)
    (command,) = commands
    assert main([*shlex.split(command), "--workers", "1"]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "compare" / "report.html").exists()
