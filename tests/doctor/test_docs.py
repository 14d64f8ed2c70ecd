"""The doctor's page runs and prints what it says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def test_the_example_runs_and_prints_what_stands_below(capsys):
    ((source, printed),) = re.findall(
        r"```python\n([\s\S]*?)```\n\n((?:    .*\n)*)", PAGE.read_text()
    )
    exec(source, {})
    expected = [line.removeprefix("    ") for line in printed.splitlines()]
    assert capsys.readouterr().out.splitlines() == expected
