"""The page on folding runs, and prints what it says; its table is the record's."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fold.md").read_text()


def test_the_example_runs_and_prints_what_stands_below(capsys):
    exec(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0], {})
    printed = re.findall(r"^    (.*)$", PAGE.split("```")[2], flags=re.MULTILINE)
    assert without_digits(capsys.readouterr().out) == without_digits("\n".join(printed) + "\n")


def without_digits(text):
    """The difference is rounding, which differs from machine to machine."""
    assert re.search(r"differs by \d\.\de-0[78] ", text)
    return re.sub(r"\d\.\de-\d\d", "?", text)


def test_the_table_is_that_of_the_record():
    spec = importlib.util.spec_from_file_location("folding", ROOT / "benchmarks" / "folding.py")
    folding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(folding)
    record = folding.FoldingRecord.model_validate_json(folding.RECORD.read_bytes())
    assert folding.markdown(record) in PAGE
