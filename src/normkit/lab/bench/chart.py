"""The benchmark's chart: every shape's ratio as a dot, geometric means as bars."""

from collections.abc import Iterator
from pathlib import Path

from normkit.lab.bench.records import BenchRecord, Row
from normkit.lab.bench.subject import Timed
from normkit.lab.bench.summary import NAMES, TIMED, ratio, sized_rows
from normkit.lab.figures import FONT_SIZE, INK, STYLES, figure_file, label_axes

WIDTH, HEIGHT, LINE_HEIGHT = 8.2, 1.2, 0.25  # inches
TIMES = "\N{MULTIPLICATION SIGN}"
TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
COLOURS = {timed: colour for timed, (colour, *_) in zip(TIMED, STYLES, strict=False)}


def write_chart(path: Path, record: BenchRecord) -> None:
    """Draw a benchmark into a file.

    Raises:
        DataError: If it cannot be written.
    """
    lines, spec = list(_lines(record)), record.spec
    size = (WIDTH, HEIGHT + LINE_HEIGHT * len(lines))
    with figure_file(path, figsize=size, layout="constrained") as figure:
        axes = figure.subplots()
        label_axes(
            axes,
            {
                "title": f"{spec.shapes} shapes, {spec.dtype}, {spec.memory_format}, "
                f"{spec.device}, {spec.threads} threads; dots: shapes, bar: mean",
                "x": f"time of the peer divided by ours: right of 1{TIMES}, ours is faster",
                "y": "",
            },
        )
        for y, (_, timed, ratios, mean) in enumerate(lines):
            dots = {"marker": "o", "linestyle": "", "markersize": 5, "alpha": 0.45}
            axes.plot(ratios, [y] * len(ratios), color=COLOURS[timed], gid=f"dots-{y}", **dots)
            axes.plot(mean, y, "|", color=COLOURS[timed], markersize=13, markeredgewidth=3)
            place = {"xy": (1.01, y), "xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(f"{mean:.2f}{TIMES}", **place)
        axes.axvline(1, color=INK, linewidth=1.2, zorder=1)
        axes.set_yticks(range(len(lines)), [label for label, *_ in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        low, high = min(low, 0.5), max(high, 2)
        axes.set_xticks([t for t in TICKS if low <= t <= high])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{TIMES}")
        axes.minorticks_off()
        axes.set_xlim(low, high)
        for timed, colour in COLOURS.items():
            axes.plot([], [], "o", color=colour, label=NAMES[timed])
        figure.legend(loc="outside upper right", ncols=2, fontsize=FONT_SIZE - 1)


def _lines(record: BenchRecord) -> Iterator[tuple[str, Timed, list[float], float]]:
    """For each norm, batch size, peer and kind of pass: its label, all ratios and their mean."""
    for norm in record.spec.norms:
        for size in record.spec.batch_sizes:
            rows: list[Row] = [r for r in sized_rows(record, norm) if r.batch_size == size]
            for peer in rows[0].peers:
                for timed in TIMED:
                    label = f"{norm}, batch {size}, {peer}" if timed == TIMED[0] else ""
                    ratios = [row.ratio(peer, timed) for row in rows]
                    yield label, timed, ratios, ratio(rows, peer, timed).geometric_mean
