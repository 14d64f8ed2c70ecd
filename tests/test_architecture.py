"""What ARCHITECTURE.md says of the code's order is what the linter checks."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_order_of_imports_is_that_of_the_linter():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    checked = [[name.strip().removeprefix("normkit.") for name in row.split(":")] for row in layers]

    page = (ROOT / "ARCHITECTURE.md").read_text()
    sentence = re.search(r"Imports point downwards: (.*?)\. ", page, re.DOTALL)[1]
    told = [re.findall(r"`(\w+)`", row) for row in sentence.split(">")]
    assert told == checked
