"""The page on conversion runs, prints what it says, and its table is that of the record."""

import json
import re
import statistics
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs"
PAGE = (FOLDER / "convert.md").read_text()


def test_the_examples_run_and_print_what_stands_below(capsys):
    namespace = {}
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
