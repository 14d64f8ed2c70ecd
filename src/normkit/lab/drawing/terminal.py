"""Panels in a terminal, with one coloured character per element."""

from collections.abc import Iterable

from rich.style import Style
from rich.text import Text

from normkit.lab.drawing.panels import LETTERS, Key, Panel, View, is_dark, shown

MAX_EXAMPLES = 8
ROWS, COLUMNS = (8, 5), (12, 6)  # largest number without a gap, and the number with a gap
GAP = "\N{HORIZONTAL ELLIPSIS}"
NOTHING = "\N{MIDDLE DOT}"


def draw_lines(panel: Panel, width: int) -> Iterable[Text]:
    """Draw a panel in lines of at most ``width`` characters, without the middle of long axes.

    Examples go down, channels to the right; a block holds the positions of one channel.
    """
    num_examples, num_channels, num_rows, num_columns = panel.cells.shape
    margin = len(f"n{num_examples - 1} ")
    columns = shown(num_columns, *COLUMNS)
    block = max(len(columns), len(f"c{num_channels - 1}"))
    channels = shown(num_channels, (width - margin + 1) // (block + 1))
    view = View(shown(num_examples, MAX_EXAMPLES), channels, shown(num_rows, *ROWS), columns)
    names = (GAP if c is None else f"c{c}".ljust(block) for c in channels)
    yield _line("", margin, [Text(name) for name in names])
    for example in view.examples:
        yield from [Text(GAP)] if example is None else _example(panel, view, example, margin, block)
        if num_rows > 1 or example == num_examples - 1:
            yield Text()
    if len(panel.key(view).ranks) > len(LETTERS):
        yield Text("There are more groups than letters, so letters repeat.\n", style="dim")


def _example(panel: Panel, view: View, example: int, margin: int, block: int) -> Iterable[Text]:
    key = panel.key(view)
    for row in view.rows:
        blocks = []
        for channel in view.channels:
            places = [(example, channel, row, column) for column in view.columns]
            cells = Text.assemble(*(_cell(panel, key, place) for place in places))
            cells.pad_right(block - len(cells))
            blocks.append(Text(GAP) if channel is None else cells)
        yield _line(f"n{example}" if row == 0 else "", margin, blocks)


def _line(name: str, margin: int, blocks: Iterable[Text]) -> Text:
    line = Text(name.ljust(margin)) + Text(" ").join(blocks)
    line.rstrip()
    return line


def _cell(panel: Panel, key: Key, place: tuple[int | None, ...]) -> Text:
    if None in place:
        return Text(GAP)
    group = int(panel.cells[place])
    if group < 0:
        return Text(NOTHING, style="dim")
    colour = key.colour(group)
    ink = "#ffffff" if is_dark(colour) else "#000000"
    return Text(key.letter(group), style=Style(color=ink, bgcolor=colour))
