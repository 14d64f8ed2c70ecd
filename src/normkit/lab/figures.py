"""Figures in files: colours that everybody tells apart, and equal files for equal data."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normkit.lab.files import whole_file

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
WIDTH_OF_A_PLACE = 0.6  # that points of several curves share
INK = "#1d2126"


@contextmanager
def figure_file(path: Path, **options: Any) -> Generator[Any]:
    """Draw on a matplotlib figure in a block; it is written, whole, at the end.

    Args:
        path: The name ends in .svg, .png or .pdf, which is the format.
        options: Of the figure.

    Raises:
        DataError: If it cannot be written.
    """
    import matplotlib as mpl  # only who draws waits for it
    from matplotlib.figure import Figure

    rules: dict[Any, Any] = {
        "svg.hashsalt": "normkit",
        "svg.fonttype": "none",  # text stays text
        "font.size": FONT_SIZE,
        "text.color": INK,
    }
    with mpl.rc_context(rules):
        figure = Figure(**{"dpi": 110, **options})
        yield figure
        about = {"Date": None} if path.suffix == ".svg" else None
        with whole_file(path) as draft:
            figure.savefig(draft, metadata=about)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a plot: its mean over seeds, with a band from the least to the greatest.

    Args:
        label: In the legend.
        x: Positions.
        values: One row for each seed, ``(seeds, len(x))``.
    """

    label: str
    x: Sequence[float]
    values: Any


def draw_curves(axes: Any, curves: Iterable[Curve], labels: Mapping[str, str]) -> None:
    """Draw lines in styles of their own.

    Args:
        axes: Of matplotlib.
        curves: In the order of the styles.
        labels: ``title``, ``x`` and ``y``.
    """
    for curve, (colour, marker, dashes) in zip(curves, STYLES, strict=False):
        values = np.array(curve.values, dtype=float)
        style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4}
        every = max(1, len(curve.x) // 10)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        axes.plot(curve.x, mean, label=curve.label, markevery=every, **style)
        if len(curve.x) == 1:  # a band has no width there
            axes.vlines(curve.x, low, high, color=colour, linewidth=1)
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)
    label_axes(axes, labels)
    axes.legend(fontsize=FONT_SIZE - 1)


def draw_points(axes: Any, curves: Iterable[Curve], labels: Mapping[str, str]) -> None:
    """Draw the mean and the range of each value, curves beside each other, at places in no order.

    Args:
        axes: Of matplotlib.
        curves: In the order of the styles; ``x`` counts the places.
        labels: ``title``, ``x`` and ``y``.
    """
    drawn = list(zip(curves, STYLES, strict=False))
    for number, (curve, (colour, marker, _)) in enumerate(drawn):
        values = np.array(curve.values, dtype=float)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        beside = WIDTH_OF_A_PLACE * ((number + 0.5) / len(drawn) - 0.5)
        style = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1}
        place, reach = np.array(curve.x, dtype=float) + beside, [mean - low, high - mean]
        axes.errorbar(place, mean, reach, linestyle="none", label=curve.label, **style)
    label_axes(axes, labels)
    axes.legend(fontsize=FONT_SIZE - 1)


def label_axes(axes: Any, labels: Mapping[str, str]) -> None:
    """Put title and names of axes, and a grid."""
    axes.set_title(labels["title"], fontsize=FONT_SIZE + 1)
    axes.set_xlabel(labels["x"], fontsize=FONT_SIZE)
    axes.set_ylabel(labels["y"], fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.grid(alpha=0.3)
