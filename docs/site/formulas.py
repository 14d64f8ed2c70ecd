"""A hook of MkDocs: formulas become MathML while the site is built.

Browsers draw that by themselves, with a font for mathematics. Many machines have none: the site
has a part of STIX Two Math.
"""

import html
import re
from importlib.util import find_spec
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
FONT = Path("fonts") / "STIXTwoMath-Regular.ttf"  # of the package ziamath
CHARACTERS = [
    *range(0x20, 0x7F),
    *range(0xA0, 0x100),
    *range(0x391, 0x3F6),
    *range(0x2000, 0x2300),  # punctuation, letters such as the real numbers', arrows, operators
    *range(0x2308, 0x230C),
    *range(0x1D434, 0x1D468),  # a letter alone is drawn as one of these
    *range(0x1D6E2, 0x1D71C),
]


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write every formula of a page as MathML."""
    content = BLOCK.sub(lambda m: f'<div class="formula">{mathml(m[1], "block")}</div>', content)
    return INLINE.sub(lambda m: mathml(m[1], "inline"), content)


def mathml(formula: str, display: str) -> str:
    """A formula of LaTeX as MathML."""
    return convert(html.unescape(formula).strip(), display=display)


def on_post_build(config: MkDocsConfig) -> None:
    """Put the font beside the style sheet that names it."""
    package = find_spec("ziamath")
    folder = next(iter(package.submodule_search_locations or ())) if package else ""
    with TTFont(Path(folder) / FONT) as font:
        subsetter = Subsetter(Options(notdef_outline=True))
        subsetter.populate(unicodes=CHARACTERS)
        subsetter.subset(font)
        font.flavor = "woff"
        font.save(Path(config.site_dir) / "site" / "math.woff")
