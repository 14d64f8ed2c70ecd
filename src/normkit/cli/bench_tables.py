"""Tables of a benchmark for the terminal."""

from rich.table import Table
from rich.text import Text

from normkit.cli.streams import Terminal
from normkit.lab.bench import BenchRecord, cells_of, targets_of
from normkit.lab.bench.end_to_end import NETWORKS, EndToEndRecord, pairs_of
from normkit.lab.bench.fused import FusedRecord
from normkit.lab.bench.markdown import slowest_text
from normkit.lab.bench.records import BATCH_NORM, OURS, Row
from normkit.lab.bench.summary import TIMED, BenchCell, Target, Timed, tiny_rows

SIDES = {"forward": "fwd", "forward_backward": "fwd+bwd"}


def print_bench(record: BenchRecord, verbose: bool) -> None:
    """Print ratios by norm and batch size, the tiny map, the targets, and if verbose each shape."""
    console = Terminal()
    console.print(_ratio_table(record))
    console.print(_tiny_table(record))
    if verbose:
        console.print(_shape_table(record))
    targets = targets_of(record)
    if targets:
        console.print(_target_table(targets))


def print_end_to_end(record: EndToEndRecord) -> None:
    """Print the times of the training steps, and their memory if it was measured."""
    table = Table(title="Training step")
    table.add_column("network", no_wrap=True)
    for name in ("input", "norm", "torch, ms", "ours, ms", "torch / ours", "peak MiB"):
        table.add_column(name)
    for result in record.results:
        work = result.workload
        for name, ours, theirs in pairs_of(result):
            measured = [k for k in NETWORKS[name] if k in result.peak_bytes]
            peaks = " and ".join(f"{result.peak_bytes[k] / 2**20:.0f}" for k in measured)
            table.add_row(
                work.model, str((work.batch_size, *work.input_shape)), name,
                f"{1e3 * theirs.median_s:.2f}", f"{1e3 * ours.median_s:.2f}",
                f"{theirs.median_s / ours.median_s:.2f}", peaks,
            )  # fmt: skip
    Terminal().print(table)


def print_fused(record: FusedRecord) -> None:
    """Print the times of torch's layers and of our separate ones, divided by the fused ones'."""
    table = _table("Forward and backward, time divided by that of one pass", "what")
    for name in ("torch's", "ours, one by one"):
        table.add_column(name, justify="right")
    for residual in (False, True):
        ratios = (f"{record.mean_ratio(side, residual):.2f}" for side in ("torch", "separate"))
        name = "norm, sum and ReLU" if residual else "norm and ReLU"
        table.add_row(f"{name}, geometric mean", *ratios)
    for row in record.networks:
        size = "x".join(map(str, (row.workload.batch_size, *row.workload.input_shape)))
        ratios = (f"{row.ratio(side):.2f}" for side in ("torch", "separate"))
        table.add_row(f"step of {row.workload.model}, {size}", *ratios)
    Terminal().print(table)


def _ratio_table(record: BenchRecord) -> Table:
    table = _table("Time of the peer divided by ours, geometric mean, slowest shape", "norm")
    table.add_column("against")
    for size in record.spec.batch_sizes:
        table.add_column(f"batch {size}", justify="right")
    cells = cells_of(record)
    for norm, peer in dict.fromkeys((cell.norm, cell.peer) for cell in cells):
        found = [cell for cell in cells if (cell.norm, cell.peer) == (norm, peer)]
        table.add_row(Text(norm), peer, *(_cell_text(cell) for cell in found))
        table.add_section()
    return table


def _cell_text(cell: BenchCell) -> str:
    lines = []
    for timed in TIMED:
        ratio = getattr(cell, timed)
        lines.append(f"{SIDES[timed]} {ratio.geometric_mean:.2f}")
        lines.append(slowest_text(ratio))
    return "\n".join(lines)


def _tiny_table(record: BenchRecord) -> Table:
    table = _table("The tiny map 2x64x8x8: microseconds (divided by nn.BatchNorm2d's time)", "norm")
    for timed in TIMED:
        table.add_column(SIDES[timed], justify="right")
    for row in tiny_rows(record):
        table.add_row(Text(row.norm), *(_tiny_text(row, timed) for timed in TIMED))
    return table


def _tiny_text(row: Row, timed: Timed) -> str:
    time_us = 1e6 * getattr(row.entries[OURS], timed).median_s
    return f"{time_us:.0f} ({1 / row.ratio(BATCH_NORM, timed):.2f})"


def _shape_table(record: BenchRecord) -> Table:
    table = _table("Every shape: milliseconds of ours and the peer, and their ratio", "norm")
    table.add_column("map")
    table.add_column("against")
    for timed in TIMED:
        table.add_column(SIDES[timed], justify="right")
    for row in record.rows:
        shape = "x".join(map(str, (row.batch_size, *row.shape)))
        for peer in row.peers:
            table.add_row(
                Text(row.norm), shape, peer, *(_times_text(row, peer, timed) for timed in TIMED)
            )
    return table


def _times_text(row: Row, peer: str, timed: Timed) -> str:
    ours, theirs = (1e3 * getattr(row.entries[key], timed).median_s for key in (OURS, peer))
    return f"{ours:.3f} {theirs:.3f} {row.ratio(peer, timed):.2f}"


def _target_table(targets: list[Target]) -> Table:
    table = _table("Targets", "target")
    for name in ("wanted", "measured", ""):
        table.add_column(name)
    for target in targets:
        held = Text("held", style="green") if target.held else Text("missed", style="red")
        table.add_row(target.name, target.wanted, target.measured, held)
    return table


def _table(title: str, first: str) -> Table:
    return Table(first, title=title, title_justify="left", title_style="bold")
