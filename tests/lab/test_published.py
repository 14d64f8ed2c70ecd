"""The tables in the documentation are those of the records beside them."""

import importlib.util
import json
import re
import statistics
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest

from normkit.lab.comparison import compared
from normkit.lab.config import KNOWN as OPTIONS
from normkit.lab.data.known import KNOWN as NAMED_BY_PAPERS
from normkit.lab.data.sources import OF_FOLDERS, READERS
from normkit.lab.models import ARCHITECTURES
from normkit.lab.records import TrainingRecord
from normkit.lab.spec import SweepSpec
from normkit.lab.verdict import verdict_of

DOCS = Path(__file__).parents[2] / "docs"


def accuracies(name):
    """Test accuracies in percent, seed by seed, by norm and batch size."""
    found = defaultdict(dict)
    for line in (DOCS / "records" / name).read_text().splitlines():
        record = json.loads(line)
        spec, outcome = record["spec"], record["outcome"]
        assert outcome["status"] == "finished"
        found[spec["norm"], spec["batch_size"]][spec["seed"]] = 100 * outcome["scores"]["accuracy"]
    return found


def test_the_table_of_the_methods_is_that_of_its_records():
    found = accuracies("compare-methods.jsonl")
    page = (DOCS / "compare.md").read_text()
    lines = [line.split("│") for line in page.splitlines() if "±" in line and "│" in line]
    rows = {line[1].strip(): line for line in lines}
    assert len(found) == 16
    for (norm, batch_size), by_seed in found.items():
        values = list(by_seed.values())
        shown = rows[norm][2 if batch_size == 2 else 3].strip()
        assert shown == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def test_the_readme_has_the_tables_of_its_records():
    spec = importlib.util.spec_from_file_location("update", DOCS / "update_compare.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    page = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert page.count("<!-- begin compare-") == 2
    assert update.updated(page) == page
    changed = page.replace(" ± 0.", " ± 1.")
    assert update.updated(changed) == page != changed


@pytest.mark.parametrize(
    ("name", "page", "norms"),
    [
        ("compare-digits", "../README.md", "bn,gn:8,bgn:auto"),
        ("compare-fashion-mnist", "../README.md", "bn,gn:8,bgn:auto"),
        (
            "compare-methods",
            "compare.md",
            "bn,gn:8,gn:8+ws,bgn:auto,ghost:4,gnplus:8,bcn:8:micro+ws,sn",
        ),
    ],
)
def test_the_verdicts_are_those_of_the_records(name, page, norms):
    lines = (DOCS / "records" / f"{name}.jsonl").read_text().splitlines()
    records = [TrainingRecord.model_validate_json(line) for line in lines]
    sweep = SweepSpec(
        protocol=records[0].spec.protocol,
        norms=tuple(norms.split(",")),
        batch_sizes=tuple(sorted({record.spec.batch_size for record in records})),
        seeds=(1, 2, 3),
    )
    said = verdict_of(compared(sweep, records)).lines
    text = " ".join((DOCS / page).read_text().replace("\n> ", " ").split())
    assert said[0] in text
    if page == "compare.md":
        assert all(line in text for line in said)


@pytest.mark.parametrize("page", ["doctor", "tune", "convert"])
def test_a_page_makes_the_checkpoint_that_its_commands_use(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    made = text.index("--save-weights --out runs/first")
    commands = [line for line in text.splitlines() if line.startswith("    normkit")]
    used = [line for line in commands if "--checkpoint" in line]
    assert used
    assert all("--checkpoint runs/first/weights/bn-b8-s1-*.safetensors" in line for line in used)
    assert made < text.index(used[0])


def test_the_tables_of_options_names_and_models_are_those_of_the_code():
    page = (DOCS / "compare.md").read_text()
    table = page.partition("| option | default | meaning |")[2].partition("The exit code is 0")[0]
    rows = {line.split("`")[1].split(" ")[0]: line for line in table.splitlines() if "`" in line}
    spelled = {"learning_rates": "tune_lr"}
    options = {f"--{spelled.get(name, name).replace('_', '-')}" for name in OPTIONS}
    assert options - {"--processes"} <= {*re.findall(r"`(--[\w-]+)", table)}  # torchrun says it
    for name in (*READERS, *OF_FOLDERS, *NAMED_BY_PAPERS):
        assert f"`{name}" in rows["--data"]
    for name, kind in ARCHITECTURES.items():
        said = re.search(rf"`{name}((:\w+=N)*)`", rows["--model"].split("|")[3])
        assert said is not None, name
        assert re.findall(r":(\w+)=N", said[1]) == [field.name for field in fields(kind)]
