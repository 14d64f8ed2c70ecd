"""Panels side by side as a PNG or SVG picture."""

import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from normkit.lab.drawing.panels import Indices, Panel, View, is_dark, shown
from normkit.lab.figures import INK, figure_file

CELL, SPACE, GAP = 10, 6, 14  # pixels of an element, between blocks, and of a gap
MAX_EXAMPLES, MAX_CHANNELS = 8, 12
POSITIONS = (12, 6)  # largest number of rows or columns without a gap, and the number with a gap
MAX_LETTERS = 4  # blocks with more groups get no letters
LEFT, BOTTOM, TOP, LINE = 0.55, 0.5, 0.55, 0.17  # inches: margins of panels, height of a text line
MIN_WIDTH, CHARACTERS = 3.4, 15  # inches of a panel, and characters of a title per inch
DOTS_PER_INCH = 160
PAPER, NOTHING = "#ffffff", "#e9ecef"
Place = tuple[int, int]
Blocks = defaultdict[Place, defaultdict[int, list[Place]]]


class _Ruler(NamedTuple):
    """Positions of blocks along one axis, and of the elements in a block, in pixels."""

    outer: Indices
    inner: Indices

    @property
    def starts(self) -> list[int]:
        """First pixel of each block, then the first pixel after the last block and its space."""
        block = sum(GAP if index is None else CELL for index in self.inner)
        starts = [0]
        for index in self.outer:
            starts.append(starts[-1] + SPACE + (GAP if index is None else block))
        return starts

    @property
    def size(self) -> int:
        """Pixels from the first block to the last."""
        return self.starts[-1] - SPACE

    def elements(self) -> Iterable[tuple[int, int, int]]:
        """Outer index, inner index and first pixel of each drawn element."""
        for start, index in zip(self.starts, self.outer, strict=False):
            place = start
            for within in self.inner:
                if index is not None and within is not None:
                    yield index, within, place
                place += GAP if within is None else CELL

    def ticks(self) -> tuple[list[float], list[str]]:
        """Middles and names of the blocks."""
        starts = self.starts
        middles = [(a + b - SPACE - 1) / 2 for a, b in itertools.pairwise(starts)]
        return middles, ["..." if index is None else str(index) for index in self.outer]


class _Sheet(NamedTuple):
    """A panel, the indices that are drawn, and their positions in pixels."""

    panel: Panel
    view: View
    down: _Ruler
    across: _Ruler

    @classmethod
    def of(cls, panel: Panel) -> "_Sheet":
        num_examples, num_channels, num_rows, num_columns = panel.cells.shape
        view = View(
            shown(num_examples, MAX_EXAMPLES),
            shown(num_channels, MAX_CHANNELS),
            shown(num_rows, *POSITIONS),
            shown(num_columns, *POSITIONS),
        )
        down, across = _Ruler(view.examples, view.rows), _Ruler(view.channels, view.columns)
        return cls(panel, view, down, across)

    def elements(self) -> Iterable[tuple[Place, Place, int]]:
        """Example and channel, first pixels across and down, and group of each drawn element."""
        for example, row, y in self.down.elements():
            for channel, column, x in self.across.elements():
                group = int(self.panel.cells[example, channel, row, column])
                yield (example, channel), (x, y), group


def write_figure(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Draw the panels side by side into a file, in the format of its suffix.

    Examples go down, channels to the right; a block holds the positions of one channel. The same
    panels give the same file.

    Raises:
        DataError: If the file cannot be written.
    """
    sheets = [_Sheet.of(panel) for panel in panels]
    widest = max(sheet.across.size for sheet in sheets)
    scale = min(max(MIN_WIDTH / widest, 0.012), 0.03)  # inches per pixel
    width, height = max(widest * scale, MIN_WIDTH), sheets[0].down.size * scale
    titles = [textwrap.wrap(panel.title, int(width * CHARACTERS)) for panel in panels]
    top = TOP + LINE * max(map(len, titles))
    page = ((LEFT + width) * len(sheets) + 0.15, BOTTOM + height + top)
    with figure_file(path, figsize=page, dpi=DOTS_PER_INCH) as figure:
        figure.text(LEFT / page[0], 1 - 0.3 / page[1], title, weight="bold", fontsize=11)
        for position, (sheet, lines) in enumerate(zip(sheets, titles, strict=True)):
            left = (LEFT + width) * position + LEFT
            box = (left, BOTTOM, sheet.across.size * scale, height)
            axes = figure.add_axes(tuple(np.divide(box, page * 2)))
            axes.set_title("\n".join(lines), loc="left", fontsize=9)
            _draw(axes, sheet)


def _draw(axes: Axes, sheet: _Sheet) -> None:
    axes.imshow(_pixels(sheet), interpolation="none", aspect="auto")
    axes.set_xticks(*sheet.across.ticks())
    axes.set_yticks(*sheet.down.ticks())
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("example n")
    axes.set_xlabel(f"channel c, {_positions(sheet.panel)} each", loc="left")
    key = sheet.panel.key(sheet.view)
    for x, y, group in _letters(sheet):
        ink = PAPER if is_dark(key.colour(group)) else INK
        axes.text(x, y, key.letter(group), color=ink, fontsize=8, ha="center", va="center")


def _positions(panel: Panel) -> str:
    rows, columns = panel.cells.shape[2:]
    if rows > 1:
        return f"{rows} \N{MULTIPLICATION SIGN} {columns} positions"
    return f"{columns} position{'' if columns == 1 else 's'}"


def _pixels(sheet: _Sheet) -> np.ndarray:
    key = sheet.panel.key(sheet.view)
    pixels = np.full((sheet.down.size, sheet.across.size, 3), 255, dtype=np.uint8)
    for _, (x, y), group in sheet.elements():
        colour = NOTHING if group < 0 else key.colour(group)
        pixels[y : y + CELL - 1, x : x + CELL - 1] = list(bytes.fromhex(colour[1:]))
    return pixels


def _letters(sheet: _Sheet) -> Iterable[tuple[float, float, int]]:
    """Positions of letters: near the middle of each group, in blocks with few groups."""
    blocks: Blocks = defaultdict(lambda: defaultdict(list))
    for block, place, group in sheet.elements():
        blocks[block][group].append(place)
    for groups in blocks.values():
        for group, places in groups.items():
            if group >= 0 and len(groups) <= MAX_LETTERS:
                middle = np.mean(places, axis=0)
                x, y = min(places, key=lambda place: math.dist(place, middle))
                yield x + CELL / 2 - 1, y + CELL / 2 - 1, group
