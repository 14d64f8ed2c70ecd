"""Geometry of line charts: positions on a drawing for values; templates do the drawing."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

SMALLEST_RANGE = 1e-6  # values closer together than this are drawn as equal
SIDE_BY_SIDE = 13.0  # largest distance between lines side by side, in units of the drawing
LABEL_DISTANCE = 15.0  # between two labels at the right edge, in units of the drawing


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value of a line: the whisker's ends, the values that it is the mean of, and a title."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    title: str = ""  # shown when the pointer is over the value


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Values that are joined by a line."""

    name: str
    style: int  # index of the colour, marker and dashes on the page
    place: float = 0.0  # horizontal place among lines drawn side by side; 0 is the middle
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Size of a drawing and of the margins around its plot."""

    width: float
    height: float
    left: float = 44
    right: float = 14
    top: float = 12
    bottom: float = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A marked position on an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A drawn value: its position, the ends of its whisker and the heights of its dots."""

    x: float
    y: float
    low: float | None
    high: float | None
    dots: tuple[float, ...]
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A drawn line and the height of its label at the right edge."""

    name: str
    style: int
    path: str
    marks: tuple[Mark, ...]
    label_y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Everything a template needs to draw a line chart."""

    frame: Frame
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Named positions along one axis of values, and its title."""

    title: str
    ticks: tuple[Tick, ...]


def line_chart(
    lines: Sequence[Line], frame: Frame, x_axis: Axis, y_title: str, *, from_zero: bool = False
) -> Chart:
    """Place lines in a frame.

    Args:
        lines: The lines; all their values must be finite.
        frame: Size of the drawing.
        x_axis: Ticks in values of ``x``; the outermost ticks bound the plot.
        y_title: Title of the vertical axis; its ticks are chosen to include all values.
        from_zero: Whether the vertical axis includes 0.
    """
    low, high = _extent(lines)
    y_values = nice_ticks(min(low, 0.0), max(high, 0.0)) if from_zero else nice_ticks(low, high)
    farthest = max((abs(line.place) for line in lines), default=0.0)
    inset = min(14 + farthest * SIDE_BY_SIDE, frame.width / 6)
    x_of = _scale(
        [tick.at for tick in x_axis.ticks], frame.left + inset, frame.width - frame.right - inset
    )
    y_of = _scale(y_values, frame.height - frame.bottom, frame.top)
    return Chart(
        frame=frame,
        x_title=x_axis.title,
        y_title=y_title,
        x_ticks=tuple(Tick(at=x_of(tick.at), text=tick.text) for tick in x_axis.ticks),
        y_ticks=tuple(Tick(at=y_of(value), text=f"{value:g}") for value in y_values),
        series=_series(lines, x_of, y_of, _step(lines, x_axis, x_of)),
    )


def nice_ticks(low: float, high: float, at_most: int = 6) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose an interval.

    Args:
        low: Lower end of the interval.
        high: Upper end, not below ``low``.
        at_most: Largest number of steps.
    """
    if high - low < SMALLEST_RANGE:
        low, high = low - 0.5, high + 0.5
    exponent = math.floor(math.log10((high - low) / at_most))
    steps = (factor * 10.0 ** (exponent + e) for e in range(3) for factor in (1, 2, 5))
    step = next(s for s in steps if _num_steps(low, high, s) <= at_most)
    first = math.floor(low / step)
    return tuple(round(i * step, 10) for i in range(first, first + _num_steps(low, high, step) + 1))


def _num_steps(low: float, high: float, step: float) -> int:
    return max(1, math.ceil(high / step) - math.floor(low / step))


def _extent(lines: Iterable[Line]) -> tuple[float, float]:
    values = [value for line in lines for value in line.values]
    ends = [end for v in values for end in (v.y, v.low, v.high, *v.dots) if end is not None]
    return min(ends, default=0.0), max(ends, default=1.0)


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    if low == high:
        return lambda _: (start + end) / 2
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


Scale = Callable[[float], float]


def _step(lines: Sequence[Line], x_axis: Axis, x_of: Scale) -> float:
    """Distance between lines side by side that leaves a gap to the lines at the next tick."""
    at = sorted(x_of(tick.at) for tick in x_axis.ticks)
    gaps = [after - before for before, after in itertools.pairwise(at) if after > before]
    return min(SIDE_BY_SIDE, 0.7 * min(gaps, default=math.inf) / max(1, len(lines)))


def _series(lines: Sequence[Line], x_of: Scale, y_of: Scale, step: float) -> tuple[Series, ...]:
    drawn = [line for line in lines if line.values]
    heights = _apart([y_of(line.values[-1].y) for line in drawn])
    marks = [tuple(_marks(line, x_of, y_of, step)) for line in drawn]
    return tuple(
        Series(
            name=line.name,
            style=line.style,
            path="M" + "L".join(f"{mark.x},{mark.y}" for mark in placed),
            marks=placed,
            label_y=height,
        )
        for line, placed, height in zip(drawn, marks, heights, strict=True)
    )


def _marks(line: Line, x_of: Scale, y_of: Scale, step: float) -> Iterator[Mark]:
    for value in line.values:
        yield Mark(
            x=round(x_of(value.x) + line.place * step, 2),
            y=y_of(value.y),
            low=None if value.low is None else y_of(value.low),
            high=None if value.high is None else y_of(value.high),
            dots=tuple(y_of(dot) for dot in value.dots),
            title=value.title,
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights of labels in the same order, moved down if labels would overlap."""
    moved = list(heights)
    lowest = -math.inf
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        moved[index] = lowest = max(heights[index], lowest + LABEL_DISTANCE)
    return moved
