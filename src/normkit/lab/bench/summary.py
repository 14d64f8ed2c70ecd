"""Summary of a benchmark: geometric means, slowest shapes, and targets."""

import statistics
from collections.abc import Iterable, Sequence

from normkit.lab.bench.records import (
    BATCH_NORM,
    CONTIGUOUS,
    COPY,
    OUR_BATCH_NORM,
    OURS,
    BenchRecord,
    Row,
)
from normkit.lab.bench.spec import Shape
from normkit.lab.bench.subject import Timed
from normkit.lab.frozen import Frozen

TIMED: tuple[Timed, ...] = ("forward", "forward_backward")
NAMES: dict[str, str] = {"forward": "forward", "forward_backward": "forward + backward"}


class Ratio(Frozen):
    """Time of a peer divided by ours, over the shapes: above 1, ours is faster."""

    geometric_mean: float
    slowest: float
    slowest_batch_size: int
    slowest_shape: Shape


class BenchCell(Frozen):
    """One norm at one batch size against one kind of peer."""

    norm: str
    batch_size: int
    peer: str
    forward: Ratio
    forward_backward: Ratio
    copies: float  # our forward time divided by that of a copy, geometric mean
    kept: float  # bytes kept for backward divided by the peer's, geometric mean
    peak: float  # peak bytes of a step divided by the peer's, geometric mean


class Target(Frozen):
    """A target: the wanted and the measured value, and whether the target is met."""

    name: str
    wanted: str
    measured: str
    held: bool


def ratio(rows: Sequence[Row], over: str, timed: Timed) -> Ratio:
    """Summarise the ratios of rows."""
    slowest = min(rows, key=lambda row: row.ratio(over, timed))
    return Ratio(
        geometric_mean=statistics.geometric_mean(row.ratio(over, timed) for row in rows),
        slowest=slowest.ratio(over, timed),
        slowest_batch_size=slowest.batch_size,
        slowest_shape=slowest.shape,
    )


def cells_of(record: BenchRecord) -> list[BenchCell]:
    """A cell for each norm, batch size and kind of peer, without the tiny map."""
    cells = []
    for norm in record.spec.norms:
        for size in record.spec.batch_sizes:
            rows = [r for r in sized_rows(record, norm) if r.batch_size == size]
            cells += [_cell(rows, peer) for peer in rows[0].peers]
    return cells


def sized_rows(record: BenchRecord, norm: str) -> list[Row]:
    """A norm's rows on the shapes of the spec."""
    return [row for row in record.rows if row.norm == norm and row.shape in record.spec.maps]


def tiny_rows(record: BenchRecord) -> list[Row]:
    """Every norm's row on the tiny map."""
    return [row for row in record.rows if BATCH_NORM in row.entries]


def _cell(rows: Sequence[Row], peer: str) -> BenchCell:
    return BenchCell(
        norm=rows[0].norm,
        batch_size=rows[0].batch_size,
        peer=peer,
        forward=ratio(rows, peer, "forward"),
        forward_backward=ratio(rows, peer, "forward_backward"),
        copies=1 / statistics.geometric_mean(row.ratio(COPY, "forward") for row in rows),
        kept=_bytes_ratio(rows, peer, "kept_bytes"),
        peak=_bytes_ratio(rows, peer, "peak_bytes"),
    )


def _bytes_ratio(rows: Iterable[Row], peer: str, field: str) -> float:
    def share(row: Row) -> float:
        ours, theirs = (getattr(row.entries[key].memory, field) for key in (OURS, peer))
        return ours / max(theirs, 1)

    return statistics.geometric_mean(share(row) for row in rows)


# geometric mean forward, forward + backward, and the slowest shape in either
TORCH_TARGETS = {
    "bn": (2.5, 1.7, 0.95),
    "gn": (1.05, 1.05, 0.9),
    "ln": (1.05, 1.05, 0.9),
    "in": (1.05, 1.05, 0.9),
}
COMPOSITION_TARGETS = {
    "bgn": 3.0, "ghost": 3.0, "gbgn": 3.0,
    "bcn": 2.5, "gnplus": 2.5, "sn": 2.5,
}  # fmt: skip
# on a GPU, forward + backward, geometric mean, by kind of peer
GPU_TARGETS = {"torch": 1.3, "composition": 1.3, "compile": 1.0}
GPU_BATCH_NORM = 1.0  # against torch's, which is cuDNN's
GPU_COMPOSITE = 2.0
COMPOSITES = ("bcn", "gnplus", "sn")
MOST_COMPOSITE = 1.2  # relative to our BatchNorm's time
MOST_TINY = 1.3
MOST_CHANNELS_LAST = 1.2


def targets_of(record: BenchRecord) -> list[Target]:
    """The targets that a record can be judged by.

    There are targets for ResNet-50's shapes only: on the CPU in float32 and with two threads, on a
    GPU in float32 and bfloat16. Other records are not judged.
    """
    spec = record.spec
    if spec.device.startswith("cuda") and spec.shapes == "resnet50":
        return [t for norm in spec.norms for t in _on_gpu(norm, sized_rows(record, norm))]
    if (spec.device, spec.dtype, spec.shapes) != ("cpu", "float32", "resnet50"):
        return []
    found = [t for norm in spec.norms for t in _of_norm(norm, sized_rows(record, norm))]
    found += [_tiny(row) for row in tiny_rows(record)]
    return found + _channels_last(record)


def _of_norm(norm: str, rows: Sequence[Row]) -> list[Target]:
    name = norm.partition(":")[0]
    targets = [_kept(norm, rows)]
    if name in TORCH_TARGETS and "torch" in rows[0].peers:
        *means, slowest = TORCH_TARGETS[name]
        targets += [
            at_least(f"{norm}, {NAMES[timed]}, geometric mean", wanted, _mean(rows, "torch", timed))
            for timed, wanted in zip(TIMED, means, strict=True)
        ]
        worst = min((ratio(rows, "torch", timed) for timed in TIMED), key=lambda r: r.slowest)
        where = f" at {(worst.slowest_batch_size, *worst.slowest_shape)}"
        targets.append(at_least(f"{norm}, slowest shape", slowest, worst.slowest, where))
    if name in COMPOSITION_TARGETS and "composition" in rows[0].peers:
        measured = _mean(rows, "composition", "forward_backward")
        name_of = f"{norm} against the best composition, forward + backward"
        targets.append(at_least(name_of, COMPOSITION_TARGETS[name], measured))
    if name in COMPOSITION_TARGETS and OUR_BATCH_NORM in rows[0].entries:
        measured = 1 / _mean(rows, OUR_BATCH_NORM, "forward_backward")
        name_of = f"{norm}, of our BatchNorm's time, forward + backward, geometric mean"
        targets.append(at_most(name_of, MOST_COMPOSITE, measured))
    return targets


def _on_gpu(norm: str, rows: Sequence[Row]) -> list[Target]:
    name, found = norm.partition(":")[0], [_kept(norm, rows)]
    for kind in rows[0].peers:
        wanted = GPU_TARGETS[kind]
        if name in COMPOSITES and kind == "composition":
            wanted = GPU_COMPOSITE
        elif name == "bn" and kind == "torch":
            wanted = GPU_BATCH_NORM
        measured = _mean(rows, kind, "forward_backward")
        found.append(at_least(f"{norm} against {kind}, forward + backward", wanted, measured))
    return found


def _mean(rows: Sequence[Row], over: str, timed: Timed) -> float:
    return ratio(rows, over, timed).geometric_mean


def _kept(norm: str, rows: Sequence[Row]) -> Target:
    def excess(row: Row) -> float:
        memory = row.entries[OURS].memory
        kept = memory.kept_bytes if memory else row.map_bytes
        return (kept - row.map_bytes) / row.map_bytes

    worst = max(rows, key=excess)
    share = excess(worst)
    return Target(
        name=f"{norm}, kept for backward",
        wanted="x and tables only",
        measured=f"x and at most {100 * share:.2g} % of it",
        held=share <= _table_share(worst),
    )


def _table_share(row: Row) -> float:
    """Size of three float64 tables (per example and channel or position), relative to the map."""
    channels, height, width = row.shape
    cells = row.batch_size * max(channels, height * width)
    return 24 * cells / row.map_bytes


def at_least(name: str, wanted: float, measured: float, where: str = "") -> Target:
    """A target with a lower bound."""
    return Target(
        name=name,
        wanted=f"at least {wanted:g} times as fast",
        measured=f"{measured:.2f}{where}",
        held=measured >= wanted,
    )


def at_most(name: str, wanted: float, measured: float, where: str = "") -> Target:
    """A target with an upper bound."""
    return Target(
        name=name,
        wanted=f"at most {wanted:g} times the time",
        measured=f"{measured:.2f}{where}",
        held=measured <= wanted,
    )


def _tiny(row: Row) -> Target:
    slowest = max(1 / row.ratio(BATCH_NORM, timed) for timed in TIMED)
    return at_most(f"{row.norm} on the tiny map, of nn.BatchNorm2d's time", MOST_TINY, slowest)


def _channels_last(record: BenchRecord) -> list[Target]:
    if record.spec.memory_format != "channels_last":
        return []
    found = []
    for norm in record.spec.norms:
        rows = sized_rows(record, norm)
        worst = max(1 / _mean(rows, CONTIGUOUS, timed) for timed in TIMED)
        name = f"{norm}, channels_last, of its contiguous time, geometric mean"
        found.append(at_most(name, MOST_CHANNELS_LAST, worst))
    return found
