"""The figure of a table: its scores and readings over batch sizes, or over parts and readings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from normkit.lab.evaluation import ACCURACY
from normkit.lab.figures import Curve, draw_curves, draw_points, figure_file
from normkit.lab.reproduce.tables.analyses import ANALYSES
from normkit.lab.reproduce.tables.reading import state_and_number
from normkit.lab.reproduce.tables.result import Column, TableResult

MAX_WIDE = 3  # panels beside each other
MAX_LETTERS = 48  # of all names below axes together; longer ones stand upright


class Panel(NamedTuple):
    """Axes of their own: columns, by the batch size or in their order."""

    columns: Sequence[Column]
    number: str
    over_sizes: bool


def draw_table(result: TableResult, path: Path) -> None:
    """Draw the scores into a file whose name ends in .svg, .png or .pdf.

    Parts with several batch sizes have axes of their own, which parts with other arms share.
    Other parts share axes, on which readings stand beside the scores. Each number has its own.

    Raises:
        DataError: If it cannot be written.
    """
    panels = panels_of(result)
    wide = min(MAX_WIDE, len(panels))
    high = math.ceil(len(panels) / wide)
    with figure_file(path, figsize=(5 * wide, 4 * high), layout="constrained") as figure:
        axes = figure.subplots(high, wide, squeeze=False).flatten()
        for each, panel in zip(axes, panels, strict=False):
            _draw(each, result, panel)
        for each in axes[len(panels) :]:
            each.remove()


def panels_of(result: TableResult) -> list[Panel]:
    """What is drawn beside each other."""
    found = []
    columns = result.columns
    for number in dict.fromkeys(_number(result, column) for column in columns):
        of_number = [column for column in columns if _number(result, column) == number]
        wide = {
            c.part
            for c in of_number
            if len({o.batch_size for o in of_number if o.part == c.part}) > 1
        }
        found += [Panel(group, number, True) for group in _shared(result, of_number, wide)]
        narrow = [column for column in of_number if column.part not in wide]
        found += [Panel(narrow, number, False)] if narrow else []
    return found


def _number(result: TableResult, column: Column) -> str:
    """What is drawn on axes of its own: a score, or a number of an analysis."""
    if not column.reading:
        return ACCURACY
    state, number = state_and_number(result.readings[column.reading])
    return state if state in ANALYSES else number or ACCURACY


def _shared(result: TableResult, columns: Sequence[Column], parts: set[str]) -> list[list[Column]]:
    """Columns of parts in groups that have no arm twice."""
    groups: list[tuple[set[str], list[Column]]] = []
    for part in dict.fromkeys(column.part for column in columns if column.part in parts):
        arms = {cell.arm for cell in result.cells if cell.part == part}
        mine = [column for column in columns if column.part == part]
        free = next((group for group in groups if not group[0] & arms), None)
        if free is None:
            groups.append((arms, mine))
        else:
            free[0].update(arms)
            free[1].extend(mine)
    return [group for _, group in groups]


def _draw(axes: Any, result: TableResult, panel: Panel) -> None:
    y = result.measured if panel.number == ACCURACY else panel.number
    if panel.over_sizes:
        parts = dict.fromkeys(column.part for column in panel.columns if column.part)
        draw_curves(
            axes, _over_sizes(result, panel), {"title": ", ".join(parts), "x": "batch size", "y": y}
        )
        sizes = sorted({column.batch_size for column in panel.columns})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, list(map(str, sizes)))
        return
    places = {column: at for at, column in enumerate(panel.columns)}
    curves = [curve for arm in result.arms if (curve := _curve(result, arm, arm, places))]
    draw_points(axes, curves, {"title": "", "x": "", "y": y})
    names = [head_of(column, result) for column in panel.columns]
    too_long = sum(map(len, names)) > MAX_LETTERS
    axes.set_xticks(range(len(names)), names, rotation=90 if too_long else 0)


def _over_sizes(result: TableResult, panel: Panel) -> list[Curve]:
    several = len({column.reading for column in panel.columns}) > 1
    curves = []
    for arm in result.arms:
        for reading in dict.fromkeys(column.reading for column in panel.columns):
            mine = sorted((c for c in panel.columns if c.reading == reading), key=lambda c: c[1])
            label = f"{arm}, {reading}" if several and reading else arm
            curve = _curve(result, arm, label, {column: column.batch_size for column in mine})
            curves += [curve] if curve else []
    return curves


def _curve(result: TableResult, arm: str, label: str, places: dict[Column, int]) -> Curve | None:
    cells = [(at, result.cell(arm, column)) for column, at in places.items()]
    there = [(at, cell.scores) for at, cell in cells if cell and cell.scores]
    if not there:
        return None
    fewest = min(len(scores) for _, scores in there)
    values = np.array([scores[:fewest] for _, scores in there]).T
    return Curve(label=label, x=[at for at, _ in there], values=values)


def head_of(column: Column, result: TableResult) -> str:
    """What stands above a column: its part, batch size and reading."""
    sizes = {each.batch_size for each in result.columns}
    shows_size = len(sizes) > 1 or not (column.part or column.reading)
    size = [f"batch {column.batch_size}"] if shows_size else []
    return " ".join([*filter(None, [column.part]), *size, *filter(None, [column.reading])])
