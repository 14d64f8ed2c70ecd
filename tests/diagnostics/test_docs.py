"""The pages on diagnostics run and print what they say."""

import json
import re
import statistics
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["analyses.md", "diagnostics.md", "probe.md"])
def test_the_examples_run_and_print_what_stands_below(page, capsys):
    namespace = {}
    text = (DOCS / page).read_text()
    blocks = re.findall(r"```python\n([\s\S]*?)```\n\n?((?:    .*\n)*)", text)
    assert len(blocks) == 2
    for source, printed in blocks:
        exec(source, namespace)
        expected = [line.removeprefix("    ") for line in printed.splitlines()]
        assert capsys.readouterr().out.splitlines() == expected


def test_the_cost_of_the_probe_is_what_was_measured():
    text = (DOCS / "probe.md").read_text()
    rows = json.loads((DOCS / "records" / "probe.json").read_text())["rows"]
    costs = [f"| {row['cpu']['percent']:.1f} % |" for row in rows]
    assert re.findall(r"\| [\d.]+ % \|$", text, flags=re.MULTILINE) == costs


def test_the_table_of_analyses_is_what_was_measured():
    text = (DOCS / "analyses.md").read_text()
    rows = json.loads((DOCS / "records" / "analyses.json").read_text())["rows"]
    names = {name for row in rows for name in row["after"]}
    assert len(names) == 11
    for name in names:
        (line,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, flags=re.MULTILINE)
        for index, cell in enumerate(line.split(" | ")):
            arm, when = ("bn", "gn:8", "gn:8+ws")[index // 2], ("before", "after")[index % 2]
            values = [r[when][name] for r in rows if r["arm"] == arm and name in r[when]]
            mean = f"{statistics.fmean(values):.3g}" if values else "-"
            assert cell.split(" ± ")[0] == mean
