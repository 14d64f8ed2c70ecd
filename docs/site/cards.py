"""A hook of MkDocs: each method's card shows which elements share statistics."""

import tempfile
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import normkit as nk
from normkit.lab.drawing import panels_of
from normkit.lab.drawing.figure import write_figure

SHAPE = (4, 8, 4, 4)
SPECS = {
    "bn": "bn",
    "in": "in",
    "ln": "ln",
    "gn": "gn:4",
    "pn": "pn",
    "bgn": "bgn:16",
    "ghost": "ghost:2",
    "gbgn": "gbgn:4:examples=2",
    "gnplus": "gnplus:4",
    "bcn": "bcn:4",
    "sn": "sn",
    "ibn": "ibn",
    "gw": "gw:4",
}
"""What a card's picture is drawn of, by the card's name."""
FACTS_END = "<!-- end -->\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures."""
    for name in SPECS:
        files.append(File.generated(config, f"images/methods/{name}.svg", content=picture(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the picture of a card after its facts."""
    folder, _, name = page.file.src_uri.removesuffix(".md").partition("/")
    if folder != "methods" or name not in SPECS:
        return markdown
    what = f"`{SPECS[name]}` on a map of four examples, eight channels and 4 x 4 positions"
    shown = (
        f"![{what}](../images/methods/{name}.svg)\n\n"
        f"In training, {what}: elements with one letter and colour share statistics.\n"
    )
    return markdown.replace(FACTS_END, f"{FACTS_END}\n{shown}", 1)


@cache
def picture(name: str) -> bytes:
    """The picture of a card, as SVG."""
    layer = nk.build(SPECS[name], SHAPE[1], batch_size=SHAPE[0], num_positions=SHAPE[2] * SHAPE[3])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        write_figure(path, panels_of(layer, SHAPE), SPECS[name])
        return path.read_bytes()
