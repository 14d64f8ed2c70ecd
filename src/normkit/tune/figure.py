"""Plot the gain over example weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from normkit.diagnostics.measurement import new_figure
from normkit.tune.gain import CONFIDENCE, QUANTILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from normkit.tune.result import Tuning

SIZE_INCHES, DOTS_PER_INCH = (6.4, 3.8), 160
LINE, BAND, MARK, INK = "#1b6ca8", "#a9c9e2", "#c2410c", "#1d2126"
TICKS = (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
LINEAR_TO = 0.1  # The axis of weights is linear up to here and logarithmic above.
LOSS_SHOWN, ROOM = 3, 1.5  # lower and upper end of the gain axis, as multiples of the largest gain


def draw(result: Tuning) -> Figure:
    """Plot the gain over the old weights, with its interval, and mark the best common weight."""
    figure = new_figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    alphas = [point.alpha for point in result.curve]
    gains = [point.gain for point in result.curve]
    errors = [QUANTILE * point.error for point in result.curve]
    low, high = ([g + sign * e for g, e in zip(gains, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(alphas, low, high, color=BAND, linewidth=0)
    axes.plot(alphas, gains, color=LINE, marker="o", markersize=3.5)
    if max(high) > 0:
        # Without this limit, the losses of large weights would hide a small gain.
        top = max(*high, result.shared_gain.high)
        axes.set_ylim(max(min(low), -LOSS_SHOWN * top), ROOM * top)
    axes.set_xscale("symlog", linthresh=LINEAR_TO)
    axes.set_xlim(0, 1)
    ticks = [tick for tick in TICKS if tick <= max(alphas)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.axhline(0, color=INK, linewidth=0.8)
    _mark_judged(axes, result)
    axes.set_xlabel("example weight alpha")
    before = "the layers' own" if isinstance(result.before, Mapping) else f"{result.before:.3g}"
    axes.set_ylabel(f"gain in {result.metric.name} against alpha = {before}")
    axes.set_title(
        f"{result.curve[0].num_examples:,} examples; the band is the {100 * CONFIDENCE:g} % "
        f"interval of a gain",
        fontsize=9,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _mark_judged(axes: Axes, result: Tuning) -> None:
    """Mark the best common weight, with its gain on the examples that did not choose it."""
    gain = result.shared_gain
    ends = [[gain.mean - gain.low], [gain.high - gain.mean]]
    label = f"{result.shared:.3g}, judged by the {gain.num_examples:,} examples that did not choose"
    axes.errorbar(
        [result.shared],
        [gain.mean],
        ends,
        color=MARK,
        marker="s",
        markersize=3,
        capsize=3,
        label=label,
    )
    axes.legend(frameon=False, fontsize=8, loc="upper left")
