"""The record of a benchmark, as one JSON file."""

from pathlib import Path

from pydantic import Field

from normkit.lab.bench.spec import TINY_SHAPE, BenchSpec, Shape
from normkit.lab.bench.subject import Memory
from normkit.lab.bench.timing import Times
from normkit.lab.environment import Environment
from normkit.lab.files import usable_folder, write_whole
from normkit.lab.frozen import Frozen
from normkit.lab.lines import read_whole

OURS = "ours"
COPY = "copy"  # x.clone(), which reads and writes the map once
BATCH_NORM = "batch_norm"  # nn.BatchNorm2d, timed with every layer on the tiny map
CONTIGUOUS = "contiguous"  # our layer on the same map in contiguous format
OUR_BATCH_NORM = "our_batch_norm"  # our BatchNorm, timed with every composite
NOT_PEERS = (OURS, COPY, BATCH_NORM, CONTIGUOUS, OUR_BATCH_NORM)


class Entry(Frozen):
    """The name, times and memory of one call of a row."""

    name: str
    forward: Times
    forward_backward: Times | None = None
    memory: Memory | None = None


class Row(Frozen):
    """A norm on maps of one shape, and all calls that were timed in turns with it.

    ``entries`` are ``ours``, ``copy``, each kind of peer, and some of ``batch_norm``,
    ``contiguous`` and ``our_batch_norm``.
    """

    norm: str
    batch_size: int
    shape: Shape
    map_bytes: int
    kernels: str
    entries: dict[str, Entry]

    @property
    def is_tiny(self) -> bool:
        """Whether the map is so small that the fixed cost of a call dominates."""
        return self.shape == TINY_SHAPE

    @property
    def peers(self) -> tuple[str, ...]:
        """The kinds of peers that the norm was measured against."""
        return tuple(kind for kind in self.entries if kind not in NOT_PEERS)

    def ratio(self, over: str, timed: str) -> float:
        """Time of another entry divided by ours: above 1, ours is faster."""
        theirs, ours = (getattr(self.entries[key], timed) for key in (over, OURS))
        return theirs.median_s / ours.median_s


class BenchRecord(Frozen):
    """The record of a benchmark: its spec, results and environment."""

    spec: BenchSpec
    rows: tuple[Row, ...]
    environment: Environment
    code_hash: str
    duration_s: float
    load_average: float = Field(description="of the machine, over one minute, at the start")


def write_record(path: Path, record: Frozen) -> None:
    """Write a record atomically.

    Raises:
        DataError: If it cannot be written.
    """
    usable_folder(path.parent)
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def read_record(path: Path) -> BenchRecord:
    """Read a record.

    Raises:
        DataError: If the file does not exist or is not a record.
    """
    way_out = "give a file that normkit bench has written"
    return read_whole(path, BenchRecord, "benchmark", way_out)
