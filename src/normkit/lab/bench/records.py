"""What a benchmark found, as one JSON file."""

from pathlib import Path

from pydantic import Field

from normkit.lab.bench.spec import TINY_SHAPE, BenchSpec, Shape
from normkit.lab.bench.subject import Memory
from normkit.lab.bench.timing import Times
from normkit.lab.environment import Environment
from normkit.lab.files import usable_folder, write_whole
from normkit.lab.lines import read_whole
from normkit.lab.spec import Frozen

OURS = "ours"
COPY = "copy"  # x.clone(): what reading and writing the map once takes
BATCH_NORM = "batch_norm"  # nn.BatchNorm2d on the tiny map, whatever the layer
CONTIGUOUS = "contiguous"  # ours on the same map laid out contiguously
OUR_BATCH_NORM = "our_batch_norm"  # our own BatchNorm, beside a composite
NOT_PEERS = (OURS, COPY, BATCH_NORM, CONTIGUOUS, OUR_BATCH_NORM)


class Entry(Frozen):
    """One call of a row: what it was, what it took."""

    name: str
    forward: Times
    forward_backward: Times | None = None
    memory: Memory | None = None


class Row(Frozen):
    """A norm on maps of one shape, and everything that was timed in turns with it.

    ``entries`` are ``ours``, ``copy``, each kind of peer, and where they apply ``batch_norm``,
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
        """Whether this is the map on which only the cost of a call counts."""
        return self.shape == TINY_SHAPE

    @property
    def peers(self) -> tuple[str, ...]:
        """The kinds of peers that the norm was measured against."""
        return tuple(kind for kind in self.entries if kind not in NOT_PEERS)

    def ratio(self, over: str, timed: str) -> float:
        """Time of another entry in times of ours: above one, ours is faster."""
        theirs, ours = (getattr(self.entries[key], timed) for key in (over, OURS))
        return theirs.median_s / ours.median_s


class BenchRecord(Frozen):
    """A benchmark: what was asked for, what was found, where and when."""

    spec: BenchSpec
    rows: tuple[Row, ...]
    environment: Environment
    code_hash: str
    duration_s: float
    load_average: float = Field(description="of the machine's last minute, when it began")


def write_record(path: Path, record: Frozen) -> None:
    """Write a record in one piece.

    Raises:
        DataError: If it cannot be written.
    """
    usable_folder(path.parent)
    write_whole(path, record.model_dump_json(indent=1) + "\n")


def read_record(path: Path) -> BenchRecord:
    """Read a record.

    Raises:
        DataError: If there is none.
    """
    way_out = "give a file that normkit bench has written"
    return read_whole(path, BenchRecord, "benchmark", way_out)
