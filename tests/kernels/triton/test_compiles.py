"""Every kernel becomes machine code of a GPU that is not there: what an interpreter cannot see."""

import collections
import itertools

import pytest
import torch

from normkit.kernels import calls, nodes

pytest.importorskip("triton", reason="triton is not installed, so there are no Triton kernels")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled for the GPU that is there", allow_module_level=True)

from kernels.triton.without_gpu import compiled_for
from normkit.kernels.calls import BatchSource, Kind
from normkit.kernels.triton import operators, primitives

HOPPER = 90
STEPS = [  # dtype, layout, shape, groups, examples a group, statistics of channels
    (torch.bfloat16, torch.channels_last, (8, 64, 56, 56), 64, 0, False),
    (torch.float32, torch.contiguous_format, (8, 64, 56, 56), 1, 0, True),
    (torch.float16, torch.contiguous_format, (4, 64, 7, 7), 8, 1, False),
    (torch.float64, torch.contiguous_format, (4, 8, 4, 4), 4, 2, False),
]
KERNELS = {
    "tile_forward_kernel", "tile_backward_kernel", "measure_groups_kernel",
    "measure_segments_kernel", "normalize_groups_kernel", "reduce_groups_kernel",
    "gradient_groups_kernel", "parameter_sums_kernel",
}  # fmt: skip


def test_every_kernel_of_the_layers_compiles():
    found = []
    for dtype, layout, shape, num_groups, examples, by_channel in STEPS:
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = (torch.zeros(shape[1], dtype=wide, requires_grad=True) for _ in range(2))
        size = shape[1] if by_channel else num_groups
        running = calls.Running(torch.zeros(size), torch.ones(size), torch.tensor(0), 0.1)
        pooling = calls.Pooling(num_groups, examples, 1e-5, by_channel)
        follower = running if examples == 0 else None
        with compiled_for(HOPPER) as kernels:
            y, _ = nodes.normalize_pooled(operators, x, weight, bias, pooling, follower)
            y.backward(torch.zeros_like(y))
        found += kernels
    names = collections.Counter(name for name, _ in found)
    assert set(names) == KERNELS
    assert all(kernel.asm["cubin"] for _, kernel in found)


COMPOSITE_KERNELS = {
    "rows_forward_kernel", "rows_backward_kernel", "columns_forward_kernel",
    "columns_backward_kernel", "columns_first_backward_kernel", "rows_first_backward_kernel",
    "switched_forward_kernel", "switched_backward_kernel", "halves_forward_kernel",
    "halves_backward_kernel", "moments_kernel", "apply_kernel", "reduce_grad_kernel",
    "combine_grad_kernel", "pool_rows_kernel", "pool_segments_kernel",
}  # fmt: skip


def test_every_kernel_of_the_composites_compiles():
    found = []
    x = torch.zeros(4, 64, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    sources = (calls.Batch(BatchSource.OWN, 0.1), calls.Batch(BatchSource.GIVEN, 0.1))
    pairs = list(itertools.product(Kind, sources))
    pairs.append((Kind.BATCH_THEN_GROUP, calls.Batch(BatchSource.ESTIMATES, 0.1)))
    for kind, batch in pairs:
        shapes = {Kind.BATCH_THEN_GROUP: (8, 8), Kind.SWITCHED: (3, 3)}.get(kind, (1, None))
        if kind == Kind.SWITCHED_WITHOUT_BATCH:
            shapes = (2, 2)
        sizes = (8, 8, 56, 56) if kind == Kind.HALVES else (64, 64, *shapes)
        slots = [None if n is None else torch.zeros(n, requires_grad=True) for n in sizes]
        moments = torch.zeros(64), torch.ones(64)  # as many as there are channels, or more
        buffers = calls.Buffers(*moments, *moments, torch.tensor(0))
        options = (calls.Composite(kind, 8, 1e-5, 1e-5), batch)
        with compiled_for(HOPPER) as kernels:
            y, _ = nodes.normalize_composite(operators, x, tuple(slots), options, buffers, None)
            y.backward(torch.zeros_like(y))
        found += kernels
    assert {name for name, _ in found} >= COMPOSITE_KERNELS
    assert all(kernel.asm["cubin"] for _, kernel in found)


def test_the_primitives_and_the_kernels_of_positions_compile():
    x, table = torch.zeros(2, 6, 8, 8, dtype=torch.bfloat16), torch.zeros(2, 6)
    with compiled_for(HOPPER) as found:
        primitives.apply(x, table.double(), table, table[:1], 64)
        primitives.reduce_grad(x[:1].expand(x.shape), x, table.double(), 64)
        primitives.combine_grad(x, x, table, (table, table, table), 64)
        y, _ = nodes.normalize_positions(
            operators, x.requires_grad_(), table[0].requires_grad_(), None, 1e-5
        )
        y.backward(x.detach())
    assert [bool(kernel.asm["cubin"]) for _, kernel in found] == [True] * len(found)
    names = {name for name, _ in found}
    assert {"apply_kernel", "positions_forward_kernel", "positions_backward_kernel"} < names
