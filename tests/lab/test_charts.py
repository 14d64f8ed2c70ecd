import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.lab.comparison import Summary
from normkit.lab.report.charts import Axis, Frame, Line, Tick, Value, line_chart, nice_ticks
from normkit.lab.text import percent, points, size_text

FRAME = Frame(width=200, height=100, left=20, right=20, top=10, bottom=10)
AXIS = Axis(title="x", ticks=(Tick(at=0, text="0"), Tick(at=2, text="2")))


@given(low=st.floats(-1e4, 1e4), width=st.floats(0, 1e4))
def test_ticks_enclose_the_interval_in_equal_round_steps(low, width):
    ticks = nice_ticks(low, low + width)
    assert ticks[0] <= low + 1e-6
    assert ticks[-1] >= low + width - 1e-6
    assert 2 <= len(ticks) <= 7
    step = ticks[1] - ticks[0]
    assert ticks == pytest.approx([ticks[0] + i * step for i in range(len(ticks))], abs=1e-6)
    power = 10 ** math.floor(math.log10(step))
    assert min(abs(step / power - good) for good in (1, 2, 5, 10)) < 1e-3


def value_of(x, y, spread):
    ends = {} if spread is None else {"low": y - spread, "high": y + spread}
    return Value(x=x, y=y, **ends)


def chart_of(*lines):
    named = [
        Line(name=str(i), style=i, values=tuple(value_of(*value) for value in line))
        for i, line in enumerate(lines)
    ]
    return line_chart(named, FRAME, AXIS, "y")


def test_values_are_placed_in_proportion():
    chart = chart_of([(0, 0, None), (1, 50, None), (2, 100, None)])
    marks = chart.series[0].marks
    assert marks[0].y == 90  # the plot's floor
    assert marks[2].y == 10  # its top
    assert marks[1].x == (marks[0].x + marks[2].x) / 2
    assert marks[1].y == 50
    assert chart.series[0].path == "M34.0,90.0L100.0,50.0L166.0,10.0"


def test_lines_side_by_side_keep_their_order_and_leave_a_gap_between_ticks():
    lines = [
        Line(name=str(p), style=0, values=(value_of(0, 1, None), value_of(2, 1, None)), place=p)
        for p in (-1.0, 0.0, 1.0)
    ]
    axis = Axis(title="x", ticks=tuple(Tick(at=at, text="") for at in (0, 1, 2)))
    marks = [series.marks for series in line_chart(lines, FRAME, axis, "y").series]
    first, last = ([m[i].x for m in marks] for i in (0, 1))
    assert first == sorted(set(first))
    assert FRAME.left <= first[0]
    assert last[-1] <= FRAME.width - FRAME.right
    gap = (last[1] - first[1]) / 2
    assert first[-1] - first[0] < 0.7 * gap


def test_dots_are_placed_as_values_are_and_held_by_the_axis():
    value = Value(x=0, y=50, dots=(0.0, 50.0, 100.0))
    chart = line_chart([Line(name="a", style=0, values=(value,))], FRAME, AXIS, "y")
    assert chart.series[0].marks[0].dots == (90, 50, 10)


def test_whiskers_stay_inside_the_plot():
    marks = chart_of([(0, 10, 30), (2, 90, 30)]).series[0].marks
    assert all(10 <= m.high < m.y < m.low <= 90 for m in marks)


def test_labels_do_not_cover_each_other():
    chart = chart_of([(0, 1, None)], [(0, 1.01, None)], [(0, 5, None)], [(0, 0.99, None)])
    heights = sorted(series.label_y for series in chart.series)
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(heights))


def test_a_line_without_values_is_left_out_and_no_lines_are_no_error():
    assert [s.name for s in chart_of([], [(0, 1, None)]).series] == ["1"]
    assert chart_of().series == ()


def test_figures_are_written_with_sign_spread_and_unit():
    assert percent(Summary(mean=0.97312, spread=0.0042, num_seeds=3)) == "97.31 ± 0.42"
    assert percent(Summary(mean=0.5, spread=None, num_seeds=1)) == "50.00"
    assert points(Summary(mean=0.003, spread=0.01, num_seeds=3)) == "+0.30 ± 1.00"
    assert points(Summary(mean=-0.003, spread=None, num_seeds=1)) == "\N{MINUS SIGN}0.30"
    assert [size_text(n) for n in (999, 1680000, 5e9)] == ["999 B", "1.68 MB", "5 GB"]
