"""The page on tuning runs, and prints what it says."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "tune.md").read_text()


def test_the_examples_run_and_print_what_stands_below(capsys):
    namespace = {}
    blocks = re.findall(r"```python\n([\s\S]*?)```\n\n?((?:    .*\n)*)", PAGE)
    assert len(blocks) == 3
    for source, printed in blocks:
        exec(source, namespace)
        expected = [line.removeprefix("    ") for line in printed.splitlines()]
        assert capsys.readouterr().out.splitlines() == expected
