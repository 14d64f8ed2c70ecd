"""How the presets' figures look: colours that everybody tells apart, and markers and dashes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Okabe & Ito's colours, dark enough for lines on paper; each with a marker and dashes of its own
STYLES = (
    ("#0072b2", "o", "-"),
    ("#d55e00", "s", "--"),
    ("#009e73", "^", "-."),
    ("#cc79a7", "D", ":"),
    ("#000000", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#e69f00", "P", (0, (1, 1))),
    ("#56b4e9", "X", (0, (8, 2))),
)
FONT_SIZE = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a plot: its mean over seeds, with a band from the least to the greatest.

    Args:
        label: In the legend.
        x: Positions.
        values: One row for each seed, ``(seeds, len(x))``.
    """

    label: str
    x: Sequence[float]
    values: Any


def by_seed(runs: Mapping[int, Mapping[str, Any]], arm: str, name: str) -> np.ndarray:
    """Something measured of an arm with every seed, ``(seeds, ...)``."""
    return np.array([arms[arm][name] for arms in runs.values()], dtype=float)


def draw_lines(axes: Any, lines: Iterable[Line], labels: Mapping[str, str]) -> None:  # noqa: ANN401
    """Draw lines in styles of their own.

    Args:
        axes: Of matplotlib.
        lines: In the order of the styles.
        labels: ``title``, ``x`` and ``y``.
    """
    for line, (colour, marker, dashes) in zip(lines, STYLES, strict=False):
        values = np.array(line.values, dtype=float)
        style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4}
        every = max(1, len(line.x) // 10)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        axes.plot(line.x, mean, label=line.label, markevery=every, **style)
        if len(line.x) == 1:  # a band has no width there
            axes.vlines(line.x, low, high, color=colour, linewidth=1)
        axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
    label_axes(axes, labels)
    axes.legend(fontsize=FONT_SIZE - 1)


def label_axes(axes: Any, labels: Mapping[str, str]) -> None:  # noqa: ANN401 - of matplotlib
    """Put title and names of axes, and a grid."""
    axes.set_title(labels["title"], fontsize=FONT_SIZE + 1)
    axes.set_xlabel(labels["x"], fontsize=FONT_SIZE)
    axes.set_ylabel(labels["y"], fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.3)


def save_figure(preset: Any, runs: Any, path: Path) -> None:  # noqa: ANN401 - a preset, its runs
    """Draw a preset's figure into a file whose name ends in .svg, .png or .pdf."""
    import matplotlib as mpl  # noqa: PLC0415 - only who draws waits for it
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    # equal runs give equal files; text stays text
    with mpl.rc_context({"svg.hashsalt": preset.name, "svg.fonttype": "none"}):
        figure = Figure(figsize=preset.size, layout="constrained")
        preset.draw(figure, runs)
        about = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=about, dpi=110)
