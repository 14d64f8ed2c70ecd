"""A benchmark as Markdown, for the documentation."""

from collections.abc import Iterable, Sequence

from normkit.lab.bench.records import BATCH_NORM, BenchRecord
from normkit.lab.bench.summary import (
    TIMED,
    BenchCell,
    Ratio,
    Target,
    cells_of,
    targets_of,
    tiny_rows,
)


def markdown(record: BenchRecord) -> str:
    """Tables of ratios, of the tiny map and of the targets, after the setting of the benchmark."""
    parts = [_setting(record), _ratios(cells_of(record)), _tiny(record)]
    targets = targets_of(record)
    return "\n\n".join(parts + ([_targets(targets)] if targets else [])) + "\n"


def _setting(record: BenchRecord) -> str:
    spec, machine = record.spec, record.environment
    return (
        f"{spec.shapes} shapes, {spec.dtype}, {spec.memory_format}, {machine.device}, "
        f"{spec.threads} threads, torch {machine.torch}, {machine.date[:10]}, code "
        f"`{record.code_hash}`, load average at the start {record.load_average:.1f}. "
        f"Numbers are the time of the peer divided by ours: above 1, ours is faster."
    )


def _ratios(cells: Iterable[BenchCell]) -> str:
    head = (
        "norm", "against", "batch", "forward", "slowest shape", "forward + backward",
        "slowest shape", "of a copy's time", "bytes kept, of the peer's", "peak bytes",
    )  # fmt: skip
    rows = (
        (
            f"`{cell.norm}`", cell.peer, str(cell.batch_size),
            f"**{cell.forward.geometric_mean:.2f}**", slowest_text(cell.forward),
            f"**{cell.forward_backward.geometric_mean:.2f}**", slowest_text(cell.forward_backward),
            f"{cell.copies:.2f}", f"{cell.kept:.2f}", f"{cell.peak:.2f}",
        )
        for cell in cells
    )  # fmt: skip
    return table(head, rows)


def slowest_text(ratio: Ratio) -> str:
    """The slowest shape: ``"0.91 at 64x112x112"``."""
    return f"{ratio.slowest:.2f} at {'x'.join(map(str, ratio.slowest_shape))}"


def _tiny(record: BenchRecord) -> str:
    head = ("tiny map 2x64x8x8", "forward, µs", "forward + backward, µs", "of nn.BatchNorm2d's")
    rows = []
    for row in tiny_rows(record):
        ours = row.entries["ours"]
        both = ours.forward_backward or ours.forward
        shares = " and ".join(f"{1 / row.ratio(BATCH_NORM, timed):.2f}" for timed in TIMED)
        times = (f"{1e6 * times.median_s:.0f}" for times in (ours.forward, both))
        rows.append((f"`{row.norm}`", *times, shares))
    return table(head, rows)


def _targets(targets: Iterable[Target]) -> str:
    head = ("target", "wanted", "measured", "")
    rows = ((t.name, t.wanted, t.measured, "held" if t.held else "**missed**") for t in targets)
    return table(head, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
