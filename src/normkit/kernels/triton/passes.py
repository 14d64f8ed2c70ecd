"""The passes over a map: one function for each streaming kernel, which plans its launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.reference import table_dtype
from normkit.kernels.triton.arguments import halves
from normkit.kernels.triton.constants import (
    ELEMENTS,
    Constants,
    accumulator,
    stream_constants,
)
from normkit.kernels.triton.geometry import (
    Grouping,
    Layout,
    Map,
    Stream,
    Strides,
    ceil_div,
    power_of_two,
    stream_blocks,
)
from normkit.kernels.triton.plan import RATE, Part, in_one_piece, launch, num_processors
from normkit.kernels.triton.streams import (
    apply_kernel,
    combine_grad_kernel,
    moments_kernel,
    reduce_grad_kernel,
)
from normkit.kernels.triton.tables import parameter_sums_kernel, pool_rows_kernel, sum_rows_kernel

PROGRAMS_THAT_REDUCE = 4  # per multiprocessor; each stores a row that the next kernel adds up
PROGRAMS_THAT_WRITE = 8  # per multiprocessor


class Table(NamedTuple):
    """A table with a value for each group or segment.

    ``row`` is the distance between the rows of two examples; it is 0 if all examples share a row.
    """

    values: Tensor
    row: int

    @classmethod
    def of(cls, values: Tensor) -> Table:
        """The table of ``values``, ``(N, K)`` or ``(1, K)``."""
        return cls(in_one_piece(values), 0 if values.shape[0] == 1 else values.shape[1])


class Parts(NamedTuple):
    """Two tables ``(N * splits, K)`` of parts of segments, each of ``span`` elements."""

    first: Tensor
    second: Tensor
    stream: Stream


class Ending(NamedTuple):
    """The ending of a call, as kernels take it. In a ``Layout``, ``added`` is the last map but one.

    Args:
        added: The residual. If ``is_result``, the result, which a backward kernel reads instead.
        is_result: Whether ``added`` is the result, which has the sign of the activation's input.
        activation: A number of ``kernels.activations.Kind``.
        slope: Slope of a leaky ReLU below 0.
    """

    added: Map | None = None
    is_result: bool = False
    activation: int = 0
    slope: float = 0.0

    @classmethod
    def of(
        cls, residual: Tensor | None, activation: int, slope: float, result: Tensor | None = None
    ) -> Ending:
        """The ending that an operator's arguments describe."""
        added = residual if result is None else result
        found = None if added is None else Map.of(added)
        return cls(found, result is not None, activation, slope)

    @property
    def maps(self) -> tuple[Map, ...]:
        """The maps that a ``Layout`` must include."""
        return () if self.added is None else (self.added,)

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that kernels read; None if there is none."""
        return None if self.added is None else self.added.tensor

    @property
    def reads_norm(self) -> bool:
        """Whether a backward kernel computes the normalised map again."""
        return self.activation > 0 and not self.is_result

    @property
    def flags(self) -> Constants:
        """Constants that kernels are compiled for."""
        added = 0 if self.added is None else 1 + self.is_result
        return {"ADDED": added, "ACT": self.activation}

    def strides(self, layout: Layout) -> Strides:
        """Strides of ``added`` in a layout."""
        return layout.strides[-2] if self.added is not None else Strides(0, 0, 0)


NO_ENDING = Ending()


class Through(NamedTuple):
    """The ending of a composite's call, for its backward kernels.

    Args:
        ending: The ending.
        factors: Scale and center ``(N, K)``, by which the kernels compute ``norm(x)`` again.
        passed: Memory in the layout of ``dx``, in which the first launch stores the gradient of the
            activation's input. It is the residual's gradient, and the second launch reads it. With
            None the second launch computes that gradient again.
    """

    ending: Ending = NO_ENDING
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    passed: Tensor | None = None


NOTHING = Through()


class Statistics(NamedTuple):
    """Statistics of groups ``(B, G)``."""

    mean: Tensor
    var: Tensor
    eps: float


def block_elements(x: Tensor) -> int:
    """Number of elements of a block of this map."""
    return max(2 * ELEMENTS // x.element_size(), 1)


def stream_of(layout: Layout, x: Tensor, programs: int) -> Stream:
    """Cut a map into ``programs`` streaming programs per multiprocessor, fewer if it is small."""
    processors = num_processors()
    return stream_blocks(layout, block_elements(x), programs * processors, processors)


def measure(x: Map, layout: Layout, out: tuple[Tensor, Tensor] | None = None) -> Parts:
    """Mean and variance of parts of segments, float64.

    They are stored in ``out`` if it is given and each segment is one part.
    """
    grouping, tensor = layout.grouping, x.tensor
    stream = stream_of(layout, tensor, PROGRAMS_THAT_REDUCE)
    if out is None or stream.splits > 1:
        out = two_tables(tensor, grouping.N * stream.splits, grouping.K, torch.float64)
    launch(
        moments_kernel,
        stream.num_programs,
        (tensor, *out),
        (*layout.strides[0], *_cut(grouping, stream)),
        # A small block has half as many threads, which synchronise faster.
        2 if stream.span <= stream.BL and layout.alignment > 1 else 4,
        **stream_constants(stream, tensor, layout),
    )
    return Parts(*out, stream)


def measure_whole(x: Map, layout: Layout, out: tuple[Tensor, Tensor]) -> Parts:
    """Store mean and variance of segments, float64, in ``out``; return those of their parts."""
    parts = measure(x, layout, out)
    if parts.stream.splits > 1:
        pool_rows(parts, layout, out)
    return parts


def two_tables(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two empty tables of this size."""
    return x.new_empty((rows, columns), dtype=dtype), x.new_empty((rows, columns), dtype=dtype)


def _cut(grouping: Grouping, stream: Stream) -> tuple[int, ...]:
    return grouping.K, grouping.Q, grouping.L, stream.splits, stream.span


class Follower(NamedTuple):
    """Buffers that a kernel updates with the statistics that it computes.

    Args:
        mean: Running mean.
        var: Running variance, unbiased.
        counter: Number of batches.
    """

    mean: Tensor
    var: Tensor
    counter: Tensor | None


def follower_arguments(
    follower: Follower | None,
) -> tuple[tuple[Tensor | Part | None, ...], Constants]:
    """A kernel's arguments for the buffers that it updates, if any, and for their rate."""
    counter = None if follower is None else follower.counter
    flags = {"HAS_RUNNING": follower is not None, "HAS_COUNTER": counter is not None}
    if follower is None:
        return (None, None, None, *RATE), flags
    return (follower.mean, follower.var, counter, *RATE), flags


def pool_rows(parts: Parts, layout: Layout, out: tuple[Tensor, Tensor]) -> None:
    """Pool the parts of segments into ``out``, two tables ``(N, K)``."""
    grouping, stream = layout.grouping, parts.stream
    columns = min(power_of_two(grouping.K), 32)
    launch(
        pool_rows_kernel,
        grouping.N * ceil_div(grouping.K, columns),
        (parts.first, parts.second, *out),
        (stream.splits, stream.span, grouping.L, grouping.K),
        BK=columns, BR=min(power_of_two(stream.splits), 32),
    )  # fmt: skip


def apply_groups(
    x: Map,
    y: Map,
    layout: Layout,
    statistics: Statistics,
    affine: tuple[Tensor | None, ...],
    ending: Ending,
) -> None:
    """Normalise by the statistics of groups, scale and shift channels, and apply the ending.

    The layout is that of ``x``, the ending's map, and ``y``.
    """
    weight, bias = affine
    grouping = layout.grouping
    tables = (statistics.mean, statistics.var, weight, bias)
    indices = (grouping.E, grouping.J, grouping.G, 0, 0, *halves(statistics.eps))
    flags = {
        "POOLED": True,
        "HAS_SCALE": weight is not None,
        "HAS_CENTER": bias is not None,
    }
    _apply((x, y), layout, tables, indices, flags, ending)


def apply_segments(
    x: Map,
    y: Map,
    layout: Layout,
    tables: tuple[Table, Table, Table],
    ending: Ending = NO_ENDING,
) -> None:
    """``scale * (x - mean) + center`` with tables of segments, then the ending."""
    mean, scale, center = tables
    values = (mean.values, None, scale.values, center.values)
    indices = (1, 1, mean.row, scale.row, center.row, 0.0, 0.0)
    flags = {"POOLED": False, "HAS_SCALE": True, "HAS_CENTER": True}
    _apply((x, y), layout, values, indices, flags, ending)


def _apply(
    maps: tuple[Map, Map],
    layout: Layout,
    tables: tuple[Tensor | None, ...],
    indices: tuple[object, ...],
    flags: Constants,
    ending: Ending,
) -> None:
    x, y = (m.tensor for m in maps)
    stream = stream_of(layout, x, PROGRAMS_THAT_WRITE)
    strides = (*layout.strides[0], *layout.strides[-1], *ending.strides(layout))
    launch(
        apply_kernel,
        stream.num_programs,
        (x, y, *tables, ending.tensor),
        (*strides, *_cut(layout.grouping, stream), *indices, *halves(ending.slope)),
        **flags,
        **ending.flags,
        **stream_constants(stream, x, layout),
    )


def reduce(grad: Map, x: Map, layout: Layout, mean: Table, through: Through = NOTHING) -> Parts:
    """``sum(grad)`` and ``sum(grad * (x - mean))`` of parts of segments.

    The layout is that of ``grad``, ``x``, the ending's map, and ``dx``.
    """
    ending, passed = through.ending, through.passed
    grouping, tensor = layout.grouping, x.tensor
    stream = stream_of(layout, tensor, PROGRAMS_THAT_REDUCE)
    dtype = table_dtype(tensor.dtype)
    sums, sums_x = two_tables(tensor, grouping.N * stream.splits, grouping.K, dtype)
    launch(
        reduce_grad_kernel,
        stream.num_programs,
        (grad.tensor, tensor, mean.values, sums, sums_x, *through.factors, ending.tensor, passed),
        (*layout.strides[0], *layout.strides[1], *ending.strides(layout), *layout.strides[-1],
         *_cut(grouping, stream), mean.row, *halves(ending.slope)),
        PASSES=passed is not None, **ending.flags, **stream_constants(stream, tensor, layout),
    )  # fmt: skip
    return Parts(sums, sums_x, stream)


def reduce_whole(
    grad: Map, x: Map, layout: Layout, mean: Table, through: Through = NOTHING
) -> tuple[Tensor, Tensor]:
    """``sum(grad)`` and ``sum(grad * (x - mean))`` of segments."""
    parts = reduce(grad, x, layout, mean, through)
    if parts.stream.splits == 1:
        return parts.first, parts.second
    return sum_rows(parts.first, parts.second, parts.stream.splits)


def sum_rows(first: Tensor, second: Tensor, run_rows: int) -> tuple[Tensor, Tensor]:
    """Sums over each run of ``run_rows`` rows of two tables."""
    num_rows, num_columns = first.shape
    num_runs = ceil_div(num_rows, run_rows)
    columns, rows = min(power_of_two(num_columns), 32), min(power_of_two(run_rows), 32)
    found = two_tables(first, num_runs, num_columns, first.dtype)
    launch(
        sum_rows_kernel,
        num_runs * ceil_div(num_columns, columns),
        (first, second, *found),
        (num_rows, run_rows, num_columns),
        BK=columns, BR=rows, ACC=accumulator(first.dtype),
    )  # fmt: skip
    return found


def flat_sums(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Two empty tensors, for ``sum(grad)`` and ``sum(grad * unit)``."""
    dtype = table_dtype(x.dtype)
    return x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype)


def parameter_gradients(
    sums: tuple[Tensor, Tensor], num_rows: int, sizes: tuple[int, int], wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from rows of sums of segments; empty where not wanted.

    ``sizes`` are the number of channels and of segments of a channel. If there is one row and
    segments are whole channels, the row is the gradient.
    """
    first, second = sums
    num_channels, parts = sizes
    if any(wanted) and num_rows * parts > 1:
        found = flat_sums(first, num_channels)
        columns = min(power_of_two(num_channels), 32)
        launch(
            parameter_sums_kernel,
            ceil_div(num_channels, columns),
            (first, second, found[1], found[0]),
            (num_rows, num_channels, parts),
            BK=columns, BR=min(power_of_two(num_rows * parts), 32), ACC=accumulator(first.dtype),
        )  # fmt: skip
        first, second = found
    dweight, dbias = wanted
    return (
        second if dweight else second.new_empty(0),
        first if dbias else first.new_empty(0),
    )


def combine_segments(
    maps: tuple[Map, Map, Map],
    layout: Layout,
    mean: Table,
    factors: tuple[Table, Table, Table],
    through: Through = NOTHING,
) -> None:
    """``k1 * grad + k2 * (x - mean) + k3`` with tables of segments; the layout as in ``reduce``."""
    grad, x, dx = maps
    places, ending = layout.strides, through.ending
    if through.passed is not None:  # it is read in place of the gradient of the result
        grad = dx._replace(tensor=through.passed)
        places, ending = (places[-1], *places[1:]), NO_ENDING
    tensors = grad.tensor, x.tensor, dx.tensor
    layout = layout._replace(strides=places)
    stream = stream_of(layout, x.tensor, PROGRAMS_THAT_WRITE)
    strides = (*places[0], *places[1], *places[-1])
    tables = (mean, *factors)
    launch(
        combine_grad_kernel,
        stream.num_programs,
        (*tensors, *(table.values for table in tables), *through.factors),
        (*strides, *_cut(layout.grouping, stream), *(table.row for table in tables),
         *halves(ending.slope)),
        ACT=ending.activation, **stream_constants(stream, x.tensor, layout),
    )  # fmt: skip
