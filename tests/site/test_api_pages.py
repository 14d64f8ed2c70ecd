"""The pages of docs/api name everything that is public, and nothing that is not there."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "api"
NAMES = re.findall(
    r"^::: (\S+)$", "\n".join(page.read_text() for page in PAGES.glob("*.md")), re.MULTILINE
)
PUBLIC = [
    *("normkit", "normkit.functional", "normkit.weights", "normkit.lab", "normkit.advice"),
    *("normkit.convert", "normkit.diagnostics", "normkit.distributed", "normkit.doctor"),
    *("normkit.folding", "normkit.fusing", "normkit.inference", "normkit.tune"),
]


def found(name):
    """What a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(name)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_a_page(module):
    shown = [found(name) for name in NAMES]
    home = importlib.import_module(module)
    public = {name: getattr(home, name) for name in home.__all__ if name != "__version__"}
    missing = [
        name
        for name, thing in public.items()
        if not isinstance(thing, ModuleType) and not any(thing is other for other in shown)
    ]
    assert not missing


def test_no_name_is_there_twice():
    things = [found(name) for name in NAMES]
    assert len({id(thing) for thing in things}) == len(NAMES) == len(set(NAMES))
    assert not any(isinstance(thing, ModuleType) for thing in things)


def test_every_page_is_in_the_table_of_contents():
    linked = re.findall(r"\]\((\w+)\.md\)", (PAGES / "README.md").read_text())
    assert sorted(linked) == sorted(page.stem for page in PAGES.glob("*.md") if page.stem[0] != "R")
