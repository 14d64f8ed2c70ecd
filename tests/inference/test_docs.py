"""The pages on recalibration and on the guard run, and print what they say."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["recalibrate", "guard"])
def test_the_examples_run_and_print_what_stands_below(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in re.finditer(
        r"```python\n(.*?)```\n((?:\n|    [^\n]*\n)*)", (DOCS / f"{name}.md").read_text(), re.DOTALL
    ):
        exec(block[1], namespace)
        printed = re.findall(r"^    (.*)$", block[2], flags=re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == printed
