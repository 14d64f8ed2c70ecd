"""Composites: two passes over the map, forward and backward, and a program on tables between them.

The program is one launch, or several if groups of channels are wide (``parts``). If channels are
few and large, several instances of a kernel share a segment, and one more launch adds up their
parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.kernels.calls import MOST_PARAMETERS, Buffers, Slots
from normkit.kernels.program import Program, parsed
from normkit.kernels.reference import table_dtype
from normkit.kernels.shapes import shapes_of, width_of
from normkit.kernels.triton import generated, passes
from normkit.kernels.triton.arguments import count_change
from normkit.kernels.triton.geometry import (
    Grouping,
    Layout,
    Map,
    ceil_div,
    power_of_two,
    result_like,
)
from normkit.kernels.triton.passes import NOTHING, Ending, Table, Through
from normkit.kernels.triton.plan import RATE, Part, in_one_piece, launch, planned

MOST_CHANNELS = 4096  # of a group that one program can hold
MOST_CELLS = 16384  # of the part of a table that one program reads in several turns
COLUMNS = 16  # channels that a program takes if groups are wide
BLOCK = 512  # cells that a program takes at a time, if a group has not more channels
Pair = tuple[Tensor, Tensor]


def forward(
    x: Tensor, text: str, parameters: Slots, share: float, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """``y`` and the table of moments; the kernels update running statistics."""
    result = planned(_forward, (x, *parameters, *buffers), (text,), share)
    count_change(buffers[2:])
    return result


def forward_ended(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    residual: Tensor | None,
    text: str,
    parameters: Slots,
    share: float,
    activation: tuple[int, float],
    buffers: Buffers,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act(y + residual)``, the table of moments, and scale and center for the backward pass."""
    tensors, options = (x, *parameters, *buffers, residual), (text, *activation)
    result = planned(_forward_ended, tensors, options, share)
    count_change(buffers[2:])
    return result


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    *tensors, text = given
    y, table, _ = _forward_ended(*tensors, None, text, 0, 0.0)
    return y, table


def _forward_ended(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, residual, text, activation, slope = given
    *parameters, given_mean, given_var, mean, var, counter = tensors
    program, ending = parsed(text), Ending.of(residual, activation, slope)
    source = Map.of(x)
    target = Map.of(result_like(source.tensor))
    grouping = Grouping.of(x, x.shape[1], 1)
    table = x.new_empty((2, grouping.N * grouping.C + program.kept_columns), dtype=torch.float64)
    kept = _Kept.of(table, grouping)
    passes.measure_whole(source, Layout.of(grouping, source), (kept.mean, kept.var))
    factors = table.new_empty((2, grouping.N * grouping.C))
    scale, center = factors.unflatten(1, kept.mean.shape).unbind()
    tensors = {
        "mean": kept.mean, "var": kept.var, "scale": scale, "center": center,
        "kept_mean": kept.batch[0], "kept_var": kept.batch[1],
        "given0": mean if given_mean is None else given_mean,
        "given1": var if given_var is None else given_var,
    }  # fmt: skip
    _run(text, grouping, {**tensors, **_named(parameters)}, (mean, var, counter))
    layout = Layout.of(grouping, source, *ending.maps, target)
    rows = _rows(kept.mean), _rows(scale), _rows(center)
    passes.apply_segments(source, target, layout, rows, ending)
    return target.tensor, table, factors


class _Kept(NamedTuple):
    """The parts of a table: moments of channels ``(N, C)``, and the batch stage's statistics."""

    mean: Tensor
    var: Tensor
    batch: Tensor

    @classmethod
    def of(cls, table: Tensor, grouping: Grouping) -> _Kept:
        size = grouping.N * grouping.C
        cells, batch = table.split((size, table.shape[1] - size), dim=1)
        mean, var = cells.unflatten(1, (grouping.N, grouping.C)).unbind()
        return cls(mean, var, batch)


def _named(parameters: list[Tensor | None]) -> dict[str, Tensor]:
    return {f"parameter{i}": in_one_piece(p) for i, p in enumerate(parameters) if p is not None}


def _rows(table: Tensor) -> Table:
    return Table(table, table.shape[1])


def backward(  # noqa: PLR0913 - the operator's own arguments
    grad: Tensor, x: Tensor, table: Tensor, text: str, parameters: Slots, share: float, wanted: int
) -> tuple[Tensor, ...]:
    """Gradient of x, and those of the parameters that are wanted, flat."""
    dx, *found = planned(_backward, (grad, x, table, *parameters), (text,), share)
    return dx, *_wanted(found, text, wanted, x)


def backward_ended(  # noqa: PLR0913 - the operator's own arguments
    grad: Tensor,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    added: tuple[Tensor | None, Tensor | None],
    text: str,
    parameters: Slots,
    share: float,
    activation: tuple[int, float],
    need_residual: bool,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradients of x and the residual, and those of the parameters that are wanted, flat.

    ``tables`` are the forward pass's, ``added`` the residual and the result, one of them or none.
    """
    tensors, options = (grad, x, *tables, *parameters, *added), (text, *activation, need_residual)
    dx, dresidual, *found = planned(_backward_ended, tensors, options, share)
    return dx, dresidual, *_wanted(found, text, wanted, x)


def _wanted(found: list[Tensor], text: str, wanted: int, x: Tensor) -> list[Tensor]:
    """A gradient for each parameter, empty where it is not wanted."""
    gradients: list[Tensor] = []
    for i, place in enumerate(_places(text)):
        if place is None or not wanted >> i & 1:
            gradients.append(x.new_empty(0, dtype=table_dtype(x.dtype)))
        else:  # a parameter of all channels has a row for each Triton program
            rows = found[place]
            gradients.append(rows if rows.ndim == 1 else rows.sum(0))
    return gradients


@lru_cache(maxsize=1024)
def _places(text: str) -> tuple[int | None, ...]:
    """Which of the gradients that a program stores is that of each parameter; None if none is."""
    names = [name for name in parsed(text).results if name.startswith("gradient")]
    known = {name: place for place, name in enumerate(names)}
    return tuple(known.get(f"gradient{i}") for i in range(MOST_PARAMETERS))


def _backward(grad: Tensor, x: Tensor, table: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *parameters, text = given
    dx, _, *found = _backward_through(grad, x, table, parameters, text)
    return dx, *found


def _backward_ended(grad: Tensor, x: Tensor, table: Tensor, *given: Any) -> tuple[Tensor, ...]:
    factors, *parameters, residual, result, text, activation, slope, need_residual = given
    ending = Ending.of(residual, activation, slope, result)
    held = in_one_piece(factors).unbind()
    writes = need_residual or ending.added is not None
    through = Through(ending, (held[0], held[1]), result_like(x) if writes else None)
    dx, passed, *found = _backward_through(grad, x, table, parameters, text, through)
    if not need_residual or passed is None:
        passed = x.new_empty(0, dtype=table_dtype(x.dtype))
    return dx, passed, *found


def _backward_through(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    parameters: list[Tensor | None],
    text: str,
    through: Through = NOTHING,
) -> tuple[Any, ...]:
    program = parsed(text)
    source = Map.of(x)
    maps = Map.of(grad), source, Map.of(result_like(source.tensor))
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps[:2], *through.ending.maps, maps[2])
    kept = _Kept.of(in_one_piece(table), grouping)
    sums = passes.reduce_whole(maps[0], source, layout, _rows(kept.mean), through)
    factors = kept.mean.new_empty((3, *kept.mean.shape)).unbind()
    tensors = {
        "mean": kept.mean, "var": kept.var, "grad_center": sums[0], "grad_scale": sums[1],
        "kept0": kept.batch[0], "kept1": kept.batch[1],
    }  # fmt: skip
    tensors |= zip(("k1", "k2", "k3"), factors, strict=True)
    found = _gradients(program, grouping, x)
    _run(text, grouping, {**tensors, **found, **_named(parameters)}, (None, None, None))
    k1, k2, k3 = (_rows(factor) for factor in factors)
    passes.combine_segments(maps, layout, _rows(kept.mean), (k1, k2, k3), through)
    return maps[2].tensor, through.passed, *found.values()


def _gradients(program: Program, grouping: Grouping, x: Tensor) -> dict[str, Tensor]:
    """Empty gradients of parameters; with a row for each Triton program if each stores a part."""
    dtype = table_dtype(x.dtype)
    cut = _Cut.of(program, grouping)
    shapes = shapes_of(program)
    found: dict[str, Tensor] = {}
    for name, line in program.results.items():
        columns = program.steps[line].columns
        if name.startswith("gradient"):
            has_parts = shapes[line].is_part and not cut.is_wide and cut.num_programs("both") > 1
            rows = (cut.num_programs("both"),) if has_parts else ()
            found[name] = x.new_empty((*rows, columns), dtype=dtype)
    return found


class _Cut(NamedTuple):
    """How a table of examples by channels is cut among Triton programs; groups have a width."""

    num_examples: int
    channels: int
    width: int

    @classmethod
    def of(cls, program: Program, grouping: Grouping) -> _Cut:
        return cls(grouping.N, grouping.C, width_of(program))

    @property
    def is_wide(self) -> bool:
        return self.width > COLUMNS and self.num_examples * self.width > MOST_CELLS

    def block(self, axes: str) -> tuple[int, int, int]:
        """Numbers of examples, groups, and channels of a group in a block."""
        if axes == "examples":
            groups, channels = 1, COLUMNS
        else:
            channels = power_of_two(self.width)
            groups = power_of_two(self.channels // self.width)
            if axes == "both":
                groups = min(groups, max(COLUMNS // channels, 1))
        rows = max(BLOCK // (groups * channels), 1)
        return min(power_of_two(self.num_examples), rows), groups, channels

    def num_programs(self, axes: str) -> int:
        rows, groups, channels = self.block(axes)
        if axes == "columns":
            return ceil_div(self.num_examples, rows)
        if axes == "examples":
            return ceil_div(self.channels, channels)
        return ceil_div(self.channels // self.width, groups)


def _run(
    text: str,
    grouping: Grouping,
    tensors: Mapping[str, Tensor],
    buffers: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Plan the launches of a program, and memory for what one stores for the next."""
    program = parsed(text)
    cut = _Cut.of(program, grouping)
    known = dict(tensors)
    parts = generated.parts_of(text, cut.is_wide)
    for index, part in enumerate(parts):
        for line in part.stored:
            step = program.steps[line]
            rows = grouping.N if step.per_example else 1
            known[f"stored{line}"] = known["mean"].new_empty((rows, step.columns))
        kernel = generated.kernel_of(text, cut.is_wide, index)
        moved = buffers if "kept_mean" in part.results else (None, None, None)
        given: list[Tensor | Part | None] = [known[name] for name in kernel.names]
        rows, groups, channels = cut.block(part.axes)
        launch(
            kernel.function,
            cut.num_programs(part.axes),
            (*given, *moved, *RATE),
            (grouping.N, grouping.L),
            min(max(rows * groups * channels // 128, 1), 8),
            HAS_RUNNING=moved[0] is not None, HAS_COUNTER=moved[2] is not None,
            BR=rows, BG=groups, BJ=channels,
        )  # fmt: skip
