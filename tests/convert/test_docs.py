"""The page on conversion runs, prints what it says, and its table is that of the record."""

import json
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType

from normkit.lab.torchvision_ops import register_missing_operators

FOLDER = Path(__file__).parents[2] / "docs"
PAGE = (FOLDER / "convert.md").read_text()


def test_the_examples_run_and_print_what_stands_below(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register_missing_operators()  # this machine's torchvision may be built for another torch
    page = ModuleType("page")  # timm registers a model in the module of its function
    monkeypatch.setitem(sys.modules, "page", page)
    namespace = vars(page)
    blocks = re.findall(r"```python\n([\s\S]*?)```\n\n?((?:    .*\n)*)", PAGE)
    for source, printed in blocks:
        exec(source, namespace)
        expected = [line.removeprefix("    ") for line in printed.splitlines()]
        assert capsys.readouterr().out.splitlines() == expected


def test_the_table_of_calibrated_conversions_is_the_record():
    rows = json.loads((FOLDER / "records" / "calibration.json").read_text())["rows"]
    table = re.findall(r"^\| `(\S+)` \| (.*±.*) \|$", PAGE, re.MULTILINE)
    assert {spec for spec, _ in table} == {row["spec"] for row in rows} - {"original"}
    for spec, cells in table:
        expected = [
            _cell([r[key] for r in rows if r["spec"] == spec and r["state"] == state])
            for key in ("top1", "accuracy")
            for state in ("plain", "calibrated")
        ]
        assert cells.split(" | ") == expected


def _cell(shares):
    values = [100 * share for share in shares]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
