"""The page on advice runs, prints what it shows, and lists every check."""

import contextlib
import io
import re
from pathlib import Path

from normkit.advice.registry import CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "advice.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_the_examples_print_what_stands_below():
    namespace = {}
    for code, shown in EXAMPLE.findall(PAGE):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        assert printed.getvalue() == shown


def test_every_check_has_a_line():
    rows = re.findall(r"^\| ([^|]*) \| [a-z, ]* \|", PAGE, re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} - {"check"} == CHECKS.keys()
