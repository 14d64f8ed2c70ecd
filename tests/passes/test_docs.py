"""The page on interruptions runs, and prints what it says."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "interrupts.md").read_text()


def test_the_example_prints_what_stands_below(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(block, {})
    printed = re.findall(r"^    (.*)$", PAGE.split("```")[2], flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == printed
