"""The tables in the documentation are those of the records beside them."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def accuracies(name):
    """Test accuracies in percent, seed by seed, by norm and batch size."""
    found = defaultdict(dict)
    for line in (DOCS / "records" / name).read_text().splitlines():
        record = json.loads(line)
        spec, outcome = record["spec"], record["outcome"]
        assert outcome["status"] == "finished"
        found[spec["norm"], spec["batch_size"]][spec["seed"]] = 100 * outcome["test_accuracy"]
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
