"""A hook of MkDocs: each method's card shows which elements share statistics."""

import tempfile
from dataclasses import replace
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import normkit as nk
from normkit.lab.drawing import Panel, panels_of
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
SIDE_BY_SIDE = ("bn", "gn", "bgn")
OVERVIEW = (
    "![A map of four examples and eight channels under bn, gn:4 and bgn:16: elements with one "
    "letter and colour share mean and variance](../images/methods/overview.svg)"
)
FACTS_END = "<!-- end -->\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures."""
    for name, spec in SPECS.items():
        drawing = picture(spec, panels(name))
        files.append(File.generated(config, f"images/methods/{name}.svg", content=drawing))
    several = [
        replace(panel, title=f"{SPECS[name]}: {panel.title}")
        for name in SIDE_BY_SIDE
        for panel in panels(name)
    ]
    drawing = picture("Elements that share mean and variance", several)
    files.append(File.generated(config, "images/methods/overview.svg", content=drawing))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the picture of a card after its facts."""
    if page.file.src_uri == "methods/README.md":
        return markdown.replace("| method |", f"{OVERVIEW}\n\n| method |", 1)
    folder, _, name = page.file.src_uri.removesuffix(".md").partition("/")
    if folder != "methods" or name not in SPECS:
        return markdown
    what = f"`{SPECS[name]}` on a map of four examples, eight channels and 4 x 4 positions"
    shown = (
        f"![{what}](../images/methods/{name}.svg)\n\n"
        f"In training, {what}: elements with one letter and colour share statistics.\n"
    )
    return markdown.replace(FACTS_END, f"{FACTS_END}\n{shown}", 1)


def panels(name: str) -> list[Panel]:
    """What there is to draw of a method."""
    layer = nk.build(SPECS[name], SHAPE[1], batch_size=SHAPE[0], num_positions=SHAPE[2] * SHAPE[3])
    return panels_of(layer, SHAPE)


def picture(title: str, drawn: list[Panel]) -> bytes:
    """A picture as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        write_figure(path, drawn, title)
        return path.read_bytes()
