"""The report of a diagnosis: one self-contained HTML file."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from normkit.doctor import Diagnosis, LayerReport
from normkit.lab.environment import describe_environment
from normkit.lab.files import write_whole
from normkit.lab.report.charts import Axis, Chart, Frame, Line, Tick, Value, line_chart
from normkit.lab.report.comparison_charts import NARROW
from normkit.lab.report.page import REPORT_NAME, templates
from normkit.lab.text import MISSING
from normkit.text import module_name

DIAGNOSIS_NAME = "diagnosis.json"
WIDE = Frame(width=820, height=320, left=56)
SHIFT_LINES = ("as the model is", "recalibrated")
LIGHT, DARK = (255, 247, 219), (0, 58, 94)  # differ in lightness, so also in greyscale


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatCell:
    """One value of the heat map."""

    text: str
    colour: str
    dark: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """Estimation shift by layer and checkpoint."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]
    low: float
    high: float


def write_diagnosis(folder: Path, found: Diagnosis, title: str, command: str) -> Path:
    """Write the report of a diagnosis; an older report is replaced atomically.

    Args:
        folder: Folder of the report.
        found: The diagnosis.
        title: Name of the model and the data.
        command: Command line that makes this report again.

    Returns:
        Path of the report.

    Raises:
        DataError: If the report cannot be written.
    """
    return write_whole(folder / REPORT_NAME, render_diagnosis(found, title, command))


def render_diagnosis(found: Diagnosis, title: str, command: str) -> str:
    """Return the report as HTML text."""
    return (
        templates()
        .get_template("doctor.html.j2")
        .render(
            found=found,
            title=title,
            command=command,
            environment=describe_environment(torch.device("cpu"), torch.get_num_threads()),
            shift_lines=SHIFT_LINES,
            shift_charts=_charts(
                found.layers,
                [lambda row: row.esm_std, lambda row: row.esm_std_recalibrated],
                SHIFT_LINES,
                "estimation shift",
            ),
            return_charts=_charts(found.layers, [lambda row: row.returns], ("loss",), "loss"),
            heat=heat_map(found),
        )
    )


Column = Callable[[LayerReport], float | None]


def _charts(
    layers: Sequence[LayerReport], columns: Sequence[Column], names: Sequence[str], title: str
) -> dict[str, Chart] | None:
    """The same lines in a wide and in a narrow frame; None if there is no value."""
    lines = [
        Line(name=name, style=style, values=tuple(_values(layers, column, name)))
        for style, (name, column) in enumerate(zip(names, columns, strict=True))
    ]
    if not any(line.values for line in lines):
        return None
    return {
        size: line_chart(lines, frame, _depths(len(layers), at_most), title, from_zero=True)
        for size, frame, at_most in (("wide", WIDE, 20), ("narrow", NARROW, 8))
    }


def _values(layers: Sequence[LayerReport], column: Column, name: str) -> Iterator[Value]:
    for depth, row in enumerate(layers, start=1):
        value = column(row)
        if value is not None and math.isfinite(value):
            said = f"{depth}, {module_name(row.name)}, {name}: {value:.4g}"
            yield Value(x=depth, y=value, title=said)


def _depths(number: int, at_most: int) -> Axis:
    step = max(1, math.ceil(number / at_most))
    ticks = (Tick(at=depth, text=str(depth)) for depth in range(1, number + 1, step))
    return Axis(title="layer", ticks=(*ticks, Tick(at=number, text="")))


def heat_map(found: Diagnosis) -> Heat | None:
    """Values and shades of the estimation shift over training; None without checkpoints."""
    columns = [
        {row.name: row.esm_std for row in each.shift.layers[1:]} for each in found.over_training
    ]
    if not columns:
        return None
    every = [value for column in columns for value in column.values() if value]
    finite = [value for value in every if math.isfinite(value)]
    low, high = min(finite, default=1.0), max(finite, default=1.0)
    rows = tuple(
        (
            module_name(name),
            tuple(_heat_cell(column.get(name), low, high) for column in columns),
        )
        for name in columns[-1]
    )
    names = tuple(each.name for each in found.over_training)
    return Heat(names=names, rows=rows, low=low, high=high)


def _heat_cell(value: float | None, low: float, high: float) -> HeatCell:
    if value is None or not math.isfinite(value):
        return HeatCell(text=MISSING, colour="#fff", dark=False)
    span = math.log(high / low) or 1.0
    share = min(max(math.log(max(value, low) / low) / span, 0.0), 1.0)
    parts = (round(a + share * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
    return HeatCell(
        text=f"{value:.3g}", colour="#" + "".join(f"{p:02x}" for p in parts), dark=share > 0.5
    )
