"""How maps are shared among programs: enough of them, and few rows for the next launch to pool."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no Triton kernels")

from normkit.kernels.triton import geometry
from normkit.kernels.triton.geometry import Grouping, Layout, Map

PROCESSORS = 132
ELEMENTS = 4096
SHAPES = [
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28), (256, 14, 14),
    (1024, 14, 14), (512, 7, 7), (2048, 7, 7),
]  # fmt: skip
MEMORY = (torch.contiguous_format, torch.channels_last)


def layout_of(shape, memory, num_groups, examples):
    x = torch.empty(shape, device="meta").contiguous(memory_format=memory)
    return Layout.of(Grouping.of(x, num_groups, examples), Map.of(x), Map.of(x))


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch_size", [32, 128])
def test_streams_give_every_processor_about_two_programs(batch_size, shape, memory):
    for num_groups, examples in ((shape[0], 0), (shape[0], 1)):
        layout = layout_of((batch_size, *shape), memory, num_groups, examples)
        grouping = layout.grouping
        stream = geometry.stream_blocks(layout, ELEMENTS, 3 * PROCESSORS, PROCESSORS)
        assert stream.num_programs >= 1.9 * PROCESSORS
        assert stream.splits * stream.span >= grouping.L > (stream.splits - 1) * stream.span
        if layout.by_channel:
            assert stream.BK >= geometry.MOST_CHANNELS


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch_size", [2, 32, 128])
def test_rows_are_few_and_hold_every_position_once(batch_size, shape, memory):
    layout = layout_of((batch_size, *shape), memory, shape[0], 0)
    grouping = layout.grouping
    rows = geometry.row_blocks(layout, ELEMENTS, 3 * PROCESSORS, PROCESSORS)
    assert rows.R <= geometry.MOST_ROWS
    assert rows.items * rows.R >= grouping.E * rows.spans > rows.items * (rows.R - 1)
    assert rows.spans * rows.span >= grouping.L > (rows.spans - 1) * rows.span
    if batch_size == 128:
        assert rows.num_programs >= 0.9 * PROCESSORS
