"""What the site's hooks make of pages, docstrings and examples."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))
pages = pytest.importorskip("pages", reason="mkdocs is not installed: pip install '.[docs]'")
docstrings = pytest.importorskip("docstrings", reason="griffe is not installed")
tutorials = pytest.importorskip("tutorials", reason="mkdocs is not installed")
sys.path.pop(0)

EXAMPLE = '''"""A title.

What it is about.

    python examples/one.py --fast
"""

import math

# %% First
# Text that goes
# on, and a list:
#
# - of one

print(math.pi)

# > 3.14
# >
# >  more

# %% Last
# Nothing but text.
'''


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("../../README.md#speed", "../index.md#speed"),
        ("bn.md", "bn.md"),
        ("../../setup.py", "../files/setup.py"),
        ("../../examples/own_norm.py", "../tutorials/own-norm.md"),
        ("../records", "../records/index.md"),
        ("../../src", "../../src"),  # a folder has no page
        ("#here", "#here"),
        ("x", "x"),  # `layers[0](x)` in code
        ("https://a.b/docs", "https://a.b/docs"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(link, expected):
    found = pages.relinked(f"see [this]({link}).", "docs/methods/bgn.md", "methods/bgn.md")
    assert found == f"see [this]({expected})."


def test_links_of_the_readme_lead_from_the_first_page():
    assert (
        pages.relinked("[a](docs/methods/bn.md)", "README.md", "index.md") == "[a](methods/bn.md)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[docs/install.md](docs/install.md) has it", "[Install](install.md) has it"),
        ("[docs/convert.md](docs/convert.md#back-to-torch)", None),
        ("[the page](docs/install.md)", "[the page](install.md)"),
        ("[no.md](no.md)", "[no.md](no.md)"),
    ],
)
def test_a_link_that_is_called_by_its_path_is_called_by_its_title(text, expected):
    title = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8").split("\n")[0][2:]
    expected = expected or f"[{title}](convert.md#back-to-torch)"
    assert pages.relinked(text, "README.md", "index.md") == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Text:\n- a\n- b\n  more\n- c", "Text:\n\n- a\n- b\n  more\n- c"),
        ("A\nparagraph:\n1. a\n2. b", "A\nparagraph:\n\n1. a\n2. b"),
        ("- a\n\n  text\n  more\n- b", "- a\n\n  text\n  more\n\n- b"),
        ("# Title\n- a", "# Title\n- a"),
        ("```\ntext\n- a\n```", "```\ntext\n- a\n```"),
        ("**Bold** text\n- a", "**Bold** text\n\n- a"),
    ],
)
def test_lists_get_the_empty_line_that_github_does_not_need(source, expected):
    assert pages.with_lists(source) == expected
    assert pages.with_lists(expected) == expected


DOCSTRING = r"""Sum.

.. math:: y = \frac{1}{2}
          + x

With :math:`x_i`; see :class:`normkit.BatchNorm`.

Args:
    x: Of shape ``(N, C)``.
    **shared: See ``TrackingOptions`` in
        ``normkit.layers.options``.

Numerics:
    Exact
    enough.

Source:
    A paper.

Example:
    >>> 1
    1
"""
MARKDOWN = r"""Sum.


\[
y = \frac{1}{2}
+ x
\]


With \(x_i\); see [`nk.BatchNorm`][normkit.BatchNorm].

Args:
    x: Of shape `(N, C)`.
    **shared: See [`TrackingOptions`][normkit.layers.options.TrackingOptions].

**Numerics:**
Exact
enough.

**Source:**
A paper.

Examples:
    >>> 1
    1
"""


def test_docstrings_become_markdown():
    assert docstrings.as_markdown(DOCSTRING) == MARKDOWN


def test_an_example_is_read_in_sections():
    before, first, last = tutorials.sections(EXAMPLE)
    assert before == tutorials.Section("", "", "import math", "")
    text = "Text that goes\non, and a list:\n\n- of one"
    assert first == tutorials.Section("First", text, "print(math.pi)", "3.14\n\n more")
    assert last == tutorials.Section("Last", "Nothing but text.", "", "")
    assert tutorials.command(EXAMPLE)[-2:] == ["examples/one.py", "--fast"]
    page = tutorials.page(EXAMPLE, "one.py")
    assert page.startswith(
        "# A title\n\nWhat it is about.\n\n[Download the script](scripts/one.py)"
    )
    assert "    python one.py --fast\n" in page
    assert "```python\nprint(math.pi)\n```\n\n```{ .text .printed .no-copy }\n3.14" in page


def test_what_an_example_prints_can_be_written_into_it(tmp_path):
    sys.path.insert(0, str(ROOT / "docs"))
    import update_examples

    sys.path.pop(0)
    assert update_examples.updated(EXAMPLE) == EXAMPLE.replace(
        "# > 3.14\n# >\n# >  more", "# > 3.141592653589793"
    )
