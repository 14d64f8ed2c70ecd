"""The page on tuning runs, and prints what it says."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "tune.md").read_text()


def test_the_examples_run_and_print_what_stands_below(capsys):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, namespace)
    printed = re.findall(r"^    (.*)$", PAGE.split("```")[2], flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines()[-len(printed) :] == printed
