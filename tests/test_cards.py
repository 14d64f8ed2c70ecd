"""The method cards are complete, their examples print what they show, and their links lead on."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

import normkit as nk
from normkit.catalog import CATALOG
from normkit.spec import METHODS, NormSpec

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "docs" / "methods"
NAMES = [*METHODS, "ws", "iew"]
SECTIONS = [
    "Idea",
    "Formula",
    "Shapes",
    "In a spec",
    "Evaluation",
    "Example",
    "What it costs",
    "When it helps, and when it does not",
    "Sources",
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def card(name):
    return (CARDS / f"{name}.md").read_text(encoding="utf-8")


def section(name, title):
    return card(name).split(f"\n## {title}\n", maxsplit=1)[1].split("\n## ", maxsplit=1)[0]


def test_every_method_has_a_card_and_every_card_is_in_the_index():
    assert {path.stem for path in CARDS.glob("*.md")} == {*NAMES, "README"}
    assert sorted(re.findall(r"^\| \[.*\]\((\w+)\.md\)", card("README"), re.MULTILINE)) == sorted(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_every_section_in_order_with_something_in_it(name):
    found = re.findall(r"^## (.*)$", card(name), re.MULTILINE)
    assert [title for title in found if title in SECTIONS] == SECTIONS
    assert all(section(name, title).strip() for title in found)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_prints_what_the_card_shows(name):
    examples = EXAMPLE.findall(card(name))
    assert examples
    namespace = {}
    for code, shown in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        assert printed.getvalue() == shown


@pytest.mark.parametrize("name", NAMES)
def test_specs_build_the_layers_beside_them(name):
    rows = re.findall(r"^\| `([^`]+)` \| `(nk\.[^`]+)`", section(name, "In a spec"), re.MULTILINE)
    assert rows
    for spec, layer in rows:
        built = NormSpec.parse(spec).norm_alone.build(64, batch_size=8)
        assert repr(built) == repr(eval(layer, {"nk": nk}))
        assert spec.endswith("+ws") == (name == "ws")


def test_the_facts_at_a_glance_are_those_of_the_catalogue():
    updated = runpy.run_path(str(ROOT / "docs" / "update_cards.py"))["updated"]
    assert set(NAMES) <= set(CATALOG)
    for name in NAMES:
        assert re.findall(r"<!-- begin (\w+) -->", section(name, "At a glance")) == [name]
        assert updated(card(name)) == card(name), "run python docs/update_cards.py"


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
