"""How a map lies in memory, how it is cut into segments and groups, and which program gets what.

A *program* is one instance of a Triton kernel. It computes a *block* at a time: an array whose axes
are powers of two, held in registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self, TypeVar

from torch import Tensor

from normkit.kernels.operators import is_dense
from normkit.kernels.triton.plan import copied

LARGEST_INT32 = 2**31 - 1
MOST_ALIGNED = 16  # triton compiles for integers that 16 divides, and for no larger divisor


class Strides(NamedTuple):
    """Distances in memory, in elements, between neighbouring examples, channels and positions."""

    example: int
    channel: int
    position: int


class Map(NamedTuple):
    """A tensor read as ``(N, C, P)``."""

    tensor: Tensor
    strides: Strides

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Read ``x`` in place if one stride reaches all positions; otherwise copy it first."""
        position = _position_stride(x)
        if position is None:
            x, position = copied(x), 1
        return cls(x, Strides(x.stride(0), x.stride(1), position))

    def folded(self, num_examples: int, num_positions: int) -> Strides | None:
        """Strides that read a run of examples as one example with more positions.

        None if the examples do not follow each other in memory as positions do.
        """
        example, channel, position = self.strides
        if num_positions == 1:
            position = example
        if example != num_positions * position:
            return None
        return Strides(num_examples * example, channel, position)

    @property
    def is_wide(self) -> bool:
        """Whether an address does not fit 32 bits."""
        sizes = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return sum((size - 1) * stride for size, stride in sizes) > LARGEST_INT32


def _position_stride(x: Tensor) -> int | None:
    """Distance between neighbouring positions; None if it is not the same for all of them."""
    axes = [(size, x.stride(axis + 2)) for axis, size in enumerate(x.shape[2:]) if size > 1]
    if not axes:
        return 1
    reach = axes[-1][1]
    for size, stride in reversed(axes):
        if stride != reach:
            return None
        reach = stride * size
    return axes[-1][1]


def result_like(x: Tensor) -> Tensor:
    """An empty tensor in the dtype and layout of ``x``: contiguous unless ``x`` is dense."""
    if is_dense(x):
        return x.new_empty_strided(x.shape, x.stride())
    return x.new_empty(x.shape)


class Grouping(NamedTuple):
    """Segments and statistics groups of a map ``(N, C, P)``.

    Every channel has ``Q`` segments of ``L`` elements. A group has ``J`` segments of each of ``E``
    examples; an example has parts of ``G`` groups.
    """

    N: int
    C: int
    Q: int
    L: int
    E: int
    J: int
    G: int

    @classmethod
    def of(cls, x: Tensor, num_groups: int, examples_per_group: int) -> Self:
        """Groups of ``x``; with ``examples_per_group=0`` they span the whole batch."""
        num_examples, num_channels = x.shape[:2]
        positions = math.prod(x.shape[2:])
        size = positions
        if num_channels % num_groups:
            size = math.gcd(positions, num_channels * positions // num_groups)
        parts = positions // size
        run = min(examples_per_group or num_examples, num_examples)
        return cls(
            num_examples, num_channels, parts, size, run, num_channels * parts // num_groups,
            num_groups,
        )  # fmt: skip

    @classmethod
    def of_segments(cls, x: Tensor, segment_size: int) -> Self:
        """Groups of one segment each."""
        parts = math.prod(x.shape[2:]) // segment_size
        return cls(x.shape[0], x.shape[1], parts, segment_size, 1, 1, x.shape[1] * parts)

    @property
    def K(self) -> int:  # noqa: N802 - the letter of the formulas
        """Segments of an example."""
        return self.C * self.Q

    @property
    def B(self) -> int:  # noqa: N802
        """Runs of examples."""
        return ceil_div(self.N, self.E)

    @property
    def num_cells(self) -> int:
        """Groups of the whole map."""
        return self.B * self.G

    @property
    def group_size(self) -> int:
        """Elements of a group."""
        return self.E * self.J * self.L

    @property
    def rest_size(self) -> int:
        """Elements of a group of the last, possibly smaller, run of examples."""
        return ((self.N - 1) % self.E + 1) * self.J * self.L

    def folded(self) -> Self:
        """The grouping of a map of which each run of examples is read as one longer example."""
        return self._replace(N=self.B, L=self.E * self.L, E=1)


class Layout(NamedTuple):
    """A grouping, the strides of the maps that take part, and whether addresses are wide."""

    grouping: Grouping
    strides: tuple[Strides, ...]
    wide: bool

    @classmethod
    def of(cls, grouping: Grouping, *maps: Map) -> Self:
        """Read each run of examples as one longer example if all maps allow it.

        Groups then have segments of one example, which is simpler for the kernels.
        """
        strides = tuple(m.strides for m in maps)
        wide = any(m.is_wide for m in maps)
        if grouping.Q == 1 and grouping.E > 1 and grouping.N % grouping.E == 0:
            folded = [m.folded(grouping.E, grouping.L) for m in maps]
            found = tuple(f for f in folded if f is not None)
            if len(found) == len(maps):
                return cls(grouping.folded(), found, wide)
        return cls(grouping, strides, wide)

    def with_whole_groups(self) -> Self:
        """The layout of the first map, with each group as one segment if it lies in one piece."""
        grouping, (example, channel, position) = self.grouping, self.strides[0]
        if channel != grouping.Q * grouping.L * position:
            return self._replace(strides=self.strides[:1])
        size = grouping.J * grouping.L
        whole = grouping._replace(C=grouping.G, Q=1, L=size, J=1)
        return self._replace(grouping=whole, strides=(Strides(example, size * position, position),))

    @property
    def alignment(self) -> int:
        """A power of two that divides addresses and sizes of segments.

        It is 1 where channels lie side by side, because the kernels do not need it there.
        """
        found = MOST_ALIGNED
        for strides in self.strides:
            found = math.gcd(found, strides.example, strides.channel)
        return 1 if self.by_channel else math.gcd(found, self.grouping.L)

    @property
    def by_channel(self) -> bool:
        """Whether channels, not positions, lie side by side in memory."""
        result = self.strides[-1]
        return result.channel < result.position


class Stream(NamedTuple):
    """Programs that stream over a map, of ``BK`` segments each and ``BL`` elements at a time."""

    BK: int
    BL: int
    splits: int
    span: int
    num_programs: int


_Cut = TypeVar("_Cut", "Stream", "Rows")
MOST_CHANNELS = 64  # of a block of channels that lie side by side: at least 128 bytes
LEAST_ELEMENTS = 1024
"""The smallest block. Blocks of small maps are made smaller than usual, so that there are enough
programs for all multiprocessors."""


def stream_blocks(layout: Layout, elements: int, wanted_programs: int, processors: int) -> Stream:
    """Cut a map into programs of blocks of at most ``elements``."""
    cuts = [_stream_blocks(layout, size, wanted_programs) for size in _sizes(elements)]
    return _enough(cuts, 2 * processors)


def _sizes(elements: int) -> Iterator[int]:
    """Sizes of blocks to try, from the largest to the smallest."""
    yield elements
    while elements > LEAST_ELEMENTS:
        elements //= 2
        yield elements


def _enough(cuts: Sequence[_Cut], num_programs: int) -> _Cut:
    """The first cut that has at least ``num_programs``; if none has, the one with the most."""
    enough = (cut for cut in cuts if cut.num_programs >= num_programs)
    return next(enough, max(cuts, key=lambda cut: cut.num_programs))


def _stream_blocks(layout: Layout, elements: int, wanted_programs: int) -> Stream:
    """Cut a map into blocks of ``elements``; if segments are few, several programs share one."""
    grouping = layout.grouping
    if layout.by_channel:
        rows = min(power_of_two(grouping.K), MOST_CHANNELS)
        columns = min(power_of_two(grouping.L), max(elements // rows, 1))
    else:
        columns = min(power_of_two(grouping.L), elements)
        rows = min(power_of_two(grouping.K), max(elements // columns, 1))
    programs = grouping.N * ceil_div(grouping.K, rows)
    shares = min(ceil_div(grouping.L, columns), max(wanted_programs // programs, 1))
    span = ceil_div(ceil_div(grouping.L, shares), columns) * columns
    splits = ceil_div(grouping.L, span)
    return Stream(rows, columns, splits, span, programs * splits)


class Rows(NamedTuple):
    """Programs that each measure a part of some groups, in blocks of ``(BG, BJ, BL)`` elements.

    The positions of an example are cut into ``spans`` stretches of ``span``. A program takes
    ``items`` pairs of an example and a stretch, and stores one row of a table; each run of examples
    has ``R`` rows. A group's segments are taken in ``turns`` blocks.
    """

    BG: int
    BJ: int
    BL: int
    items: int
    spans: int
    span: int
    R: int
    turns: int
    num_programs: int
    num_warps: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """The kernel's arguments for it."""
        steps = ceil_div(self.span, self.BL)
        return self.items, self.spans, self.span, self.R, steps, self.turns


MOST_ROWS = 128
"""Most rows of a group. Each program of the second launch pools all rows of its groups."""
FEW_ROWS = 16
"""So many rows are pooled in one step, so fewer would save nothing."""


def row_blocks(layout: Layout, elements: int, wanted_programs: int, processors: int) -> Rows:
    """Cut a map into programs that store a row each, in blocks of about ``elements``.

    If ``MOST_ROWS`` does not allow as many programs as are wanted, they have twice as many threads.
    """
    rows = _row_blocks(layout, elements, wanted_programs)
    num_groups = rows.num_programs // rows.R
    if num_groups * MOST_ROWS < wanted_programs:
        larger = _row_blocks(layout, 2 * elements, wanted_programs)
        if 4 * larger.R >= 3 * MOST_ROWS:
            return larger._replace(num_warps=8)
    cuts = [_row_blocks(layout, size, wanted_programs) for size in _sizes(elements)]
    return _enough(cuts, processors)


def _row_blocks(layout: Layout, elements: int, wanted_programs: int) -> Rows:
    grouping = layout.grouping
    if layout.by_channel:
        segments = min(power_of_two(grouping.J), MOST_CHANNELS)
        groups = min(power_of_two(grouping.G), MOST_CHANNELS // segments)
        positions = min(power_of_two(grouping.L), max(elements // (groups * segments), 1))
    else:
        positions = min(power_of_two(grouping.L), elements)
        segments = min(power_of_two(grouping.J), elements // positions)
        groups = min(power_of_two(grouping.G), elements // (positions * segments))
    columns = grouping.B * ceil_div(grouping.G, groups)
    # Small groups have fewer rows; otherwise the second launch would read more rows than map.
    most = min(MOST_ROWS, max(FEW_ROWS, math.isqrt(grouping.group_size // 3)))
    wanted = min(ceil_div(wanted_programs, columns), most)
    spans = min(max(wanted // grouping.E, 1), ceil_div(grouping.L, positions))
    span = ceil_div(ceil_div(grouping.L, spans), positions) * positions
    spans = ceil_div(grouping.L, span)
    items = ceil_div(grouping.E * spans, max(wanted, 1))
    rows = ceil_div(grouping.E * spans, items)
    turns = ceil_div(grouping.J, segments)
    return Rows(
        groups, segments, positions, items, spans, span, rows, turns, columns * rows, 4
    )  # fmt: skip


class Tile(NamedTuple):
    """Programs that hold whole groups, in one block of ``(BG, BR, BL)`` elements."""

    BG: int
    BR: int
    BL: int
    num_programs: int
    num_warps: int


SECTOR_BYTES = 32
FEW_ELEMENTS = 4096


class Limits(NamedTuple):
    """How many elements of a block a program can hold, and each of its warps."""

    elements: int
    elements_per_warp: int


def tile_blocks(layout: Layout, item_bytes: int, limits: Limits, processors: int) -> Tile | None:
    """Blocks that hold whole groups; None if groups are too large, or too few for the device."""
    grouping = layout.grouping
    rows, columns = power_of_two(grouping.E * grouping.J), power_of_two(grouping.L)
    size, groups = rows * columns, 1
    beside = SECTOR_BYTES // (item_bytes * grouping.J) if layout.by_channel else 1
    while groups < min(beside, grouping.G):
        groups *= 2
    while groups < grouping.G and groups * size < limits.elements_per_warp:
        groups *= 2
    programs = grouping.B * ceil_div(grouping.G, groups)
    elements = groups * size
    if elements > limits.elements or (elements > FEW_ELEMENTS and 2 * programs < processors):
        return None
    warps = min(max(elements // limits.elements_per_warp, 1), 16)
    return Tile(groups, rows, columns, programs, warps)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(size: int, part: int) -> int:
    """How many parts hold ``size``."""
    return -(-size // part)
