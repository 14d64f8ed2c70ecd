"""The benchmark's chart: every shape's ratio as a dot, geometric means as bars, as SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from normkit.lab.bench.records import BenchRecord, Row
from normkit.lab.bench.subject import Timed
from normkit.lab.bench.summary import NAMES, TIMED, ratio, sized_rows

WIDTH, LEFT, RIGHT, TOP, BOTTOM, LINE_HEIGHT = 820, 230, 64, 58, 46, 24
TIMES = "\N{MULTIPLICATION SIGN}"
TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
COLOURS: dict[Timed, str] = {"forward": "#0072b2", "forward_backward": "#d55e00"}
STYLE = """
  .paper { fill: #fff; } text { font: 13px system-ui, sans-serif; fill: #1d2126; }
  .soft { fill: #5d6670; } .grid { stroke: #dde1e5; } .one { stroke: #1d2126; stroke-width: 1.5; }
  .title { font-weight: 600; font-size: 15px; } .dot { fill-opacity: .45; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One line of the chart: a norm at a batch size against a peer, one kind of pass."""

    label: str
    timed: Timed
    ratios: tuple[float, ...]
    mean: float


def draw(record: BenchRecord) -> str:
    """Draw a benchmark.

    Returns:
        An SVG that stands alone.
    """
    lines = _lines(record)
    height = TOP + LINE_HEIGHT * len(lines) + BOTTOM
    x_of = _Scale.around([value for line in lines for value in line.ratios])
    body = [*_grid(x_of, height), *_legend(record)]
    for index, line in enumerate(lines):
        body += _drawn(line, TOP + LINE_HEIGHT * (index + 0.5), x_of)
    title = f"Times of torch in times of normkit, {record.spec.shapes} shapes"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title)}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """From a ratio to a position: logarithmic, and wide enough for one and its neighbours."""

    low: float
    high: float

    @classmethod
    def around(cls, ratios: Sequence[float]) -> "_Scale":
        low = max((tick for tick in TICKS if tick <= min(ratios)), default=min(ratios))
        high = min((tick for tick in TICKS if tick >= max(ratios)), default=max(ratios))
        return cls(min(low, 0.5), max(high, 2))

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    @property
    def ticks(self) -> list[float]:
        return [tick for tick in TICKS if self.low <= tick <= self.high]


def _lines(record: BenchRecord) -> list[_Line]:
    return [
        _line(rows, size, peer, timed)
        for norm in record.spec.norms
        for size in record.spec.batch_sizes
        for rows in [[r for r in sized_rows(record, norm) if r.batch_size == size]]
        for peer in rows[0].peers
        for timed in TIMED
    ]


def _line(rows: Sequence[Row], batch_size: int, peer: str, timed: Timed) -> _Line:
    label = f"{rows[0].norm}, batch {batch_size}, {peer}" if timed == TIMED[0] else ""
    return _Line(
        label=label,
        timed=timed,
        ratios=tuple(row.ratio(peer, timed) for row in rows),
        mean=ratio(rows, peer, timed).geometric_mean,
    )


def _grid(x_of: _Scale, height: float) -> Iterable[str]:
    floor = height - BOTTOM
    for tick in x_of.ticks:
        kind, x, text = "one" if tick == 1 else "grid", x_of(tick), f"{tick:g}{TIMES}"
        yield f'<line class="{kind}" x1="{x}" x2="{x}" y1="{TOP - 6}" y2="{floor}"/>'
        yield f'<text class="soft" x="{x}" y="{floor + 18}" text-anchor="middle">{text}</text>'
    yield (
        f'<text class="soft" x="{x_of(1)}" y="{height - 8}" text-anchor="middle">'
        f"time of the peer in times of ours: right of 1{TIMES}, ours is faster</text>"
    )


def _legend(record: BenchRecord) -> Iterable[str]:
    spec = record.spec
    title = (
        f"{spec.shapes} shapes, {spec.dtype}, {spec.memory_format}, {spec.device}, "
        f"{spec.threads} threads"
    )
    yield f'<text class="title" x="10" y="22">{escape(title)}</text>'
    for index, timed in enumerate(TIMED):
        x = LEFT + 190 * index
        yield f'<circle cx="{x}" cy="40" r="5" fill="{COLOURS[timed]}"/>'
        yield f'<text x="{x + 10}" y="44">{NAMES[timed]}</text>'
    yield '<text class="soft" x="10" y="44">dots: shapes, bar: mean</text>'


def _drawn(line: _Line, y: float, x_of: _Scale) -> Iterable[str]:
    colour, mean = COLOURS[line.timed], x_of(line.mean)
    yield f'<text x="10" y="{y + LINE_HEIGHT / 2 + 4}">{escape(line.label)}</text>'
    for value in line.ratios:
        yield f'<circle class="dot" cx="{x_of(value)}" cy="{y}" r="3.6" fill="{colour}"/>'
    yield f'<rect x="{mean - 2}" y="{y - 9}" width="4" height="18" rx="1.5" fill="{colour}"/>'
    yield f'<text x="{WIDTH - 8}" y="{y + 4}" text-anchor="end">{line.mean:.2f}{TIMES}</text>'
