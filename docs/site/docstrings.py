"""An extension of Griffe: docstrings as Markdown.

Ours are Google's sections around reStructuredText, as torch writes them: formulas are directives
and roles, references are roles, and ``Example:`` holds doctests.
"""

import re
import textwrap
from typing import Any

import griffe

FORMULA = re.compile(r"^( *)\.\. math::[ ]*(.*(?:\n\1[ ]+\S.*)*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
REFERENCE = re.compile(r":(?:class|func|meth):`([^`]+)`")
LITERAL = re.compile(r"``([^`]+)``")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
PARAGRAPH = re.compile(r"^( *)(Numerics|Source):\n((?:\1 +.*\n?|\n)+)", re.MULTILINE)
OPTIONS = re.compile(r"``(\w+Options)``\s+in\s+``normkit\.layers\.options``")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before its sections are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Return a docstring with formulas, references and examples as Markdown has them."""
    text = OPTIONS.sub(r"[`\1`][normkit.layers.options.\1]", docstring)
    text = PARAGRAPH.sub(_paragraph, FORMULA.sub(_formula, text))
    text = INLINE.sub(lambda match: rf"\({' '.join(match[1].split())}\)", text)
    text = REFERENCE.sub(lambda match: _reference(match[1]), text)
    text = EXAMPLE.sub(r"\1Examples:", text)
    return LITERAL.sub(r"`\1`", text)


def _formula(match: re.Match[str]) -> str:
    lines = ["", r"\[", *textwrap.dedent(match[2]).strip().splitlines(), r"\]", ""]
    return "\n".join(match[1] + line.strip() if line else "" for line in lines)


def _paragraph(match: re.Match[str]) -> str:
    """A section that Google's style does not know becomes a paragraph."""
    text = textwrap.indent(textwrap.dedent(match[3]).strip(), match[1])
    return f"{match[1]}**{match[2]}:**\n{text}\n\n"


def _reference(name: str) -> str:
    if not name.startswith("normkit."):
        return f"`{name}`"
    return f"[`{name.replace('normkit.', 'nk.', 1)}`][{name}]"
