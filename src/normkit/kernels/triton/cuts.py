"""How the calls of single-partition layers are cut into programs, forward and backward."""

from __future__ import annotations

import math

from torch import Tensor

from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import passes
from normkit.kernels.triton.constants import (
    Constants,
    fold,
    map_constants,
    stream_constants,
)
from normkit.kernels.triton.geometry import (
    MOST_CHANNELS,
    Grouping,
    Layout,
    Limits,
    Rows,
    Stream,
    Tile,
    power_of_two,
    row_blocks,
    tile_blocks,
)
from normkit.kernels.triton.plan import in_one_piece, num_processors

ROWS_AT_ONCE = 1024  # cells of a table of parts that a program pools at a time
PROGRAMS_OF_ROWS = 3  # programs of a multiprocessor that store a row each for the next launch


def table_of(values: Tensor | None) -> Tensor | None:
    """Values of channels in one piece, as kernels read them."""
    return None if values is None else in_one_piece(values)


def numbers_of(grouping: Grouping) -> tuple[int, ...]:
    """The kernels' arguments for a grouping."""
    return (grouping.N, grouping.Q, grouping.L, grouping.E, grouping.J, grouping.G)


def tile_of(layout: Layout, x: Tensor, limits: Limits) -> Tile | None:
    """Blocks that hold whole groups; None if they do not fit."""
    wide = table_dtype(x.dtype).itemsize // 4
    fitting = Limits(limits.elements // wide, limits.elements_per_warp // wide)
    return tile_blocks(layout, x.element_size(), fitting, num_processors())


def tile_constants(tile: Tile, layout: Layout, x: Tensor) -> Constants:
    """Constants of the kernels of such blocks."""
    single = layout.grouping.J == 1
    blocks = {"BG": tile.BG, "BR": tile.BR, "BL": tile.BL, "SINGLE": single}
    return {**blocks, **map_constants(layout, x)}


def rows_of(layout: Layout, x: Tensor) -> Rows:
    """Programs that each store a row of parts."""
    processors = num_processors()
    elements = passes.block_elements(x)
    if layout.by_channel and 1 < layout.grouping.J < MOST_CHANNELS:
        elements = max(elements // 2, 1)  # ``fold`` is 1 here, so a block needs more registers
    return row_blocks(layout, elements, PROGRAMS_OF_ROWS * processors, processors)


def row_constants(rows: Rows, layout: Layout, x: Tensor) -> Constants:
    """Constants of the kernels of such programs."""
    constants = map_constants(layout, x)
    constants["ALIGN"] = min(layout.alignment, rows.BL)  # must also divide a stretch
    is_mixed = rows.BG > 1 and rows.BJ > 1
    block = rows.BG * rows.BJ, rows.BL
    constants["FOLD"] = 1 if is_mixed else fold(block, x, layout, rows.num_warps)
    constants["UNIT"] = math.gcd(layout.grouping.J, rows.BJ, 16)
    return {"BG": rows.BG, "BJ": rows.BJ, "BL": rows.BL, **constants}


def stream_of(layout: Layout, x: Tensor, num_rows: int) -> tuple[Stream, Constants]:
    """Blocks of the programs that write the map, which also pool ``num_rows`` rows of parts."""
    stream = passes.stream_of(layout, x, PROGRAMS_OF_ROWS)
    rows = min(power_of_two(num_rows), max(ROWS_AT_ONCE // stream.BK, 1))
    return stream, {"BR": rows, **stream_constants(stream, x, layout)}
