"""Every kernel becomes machine code of a GPU that is not there: what an interpreter cannot see."""

import collections

import pytest
import torch

from normkit.kernels import calls, ended_nodes, nodes

pytest.importorskip("triton", reason="triton is not installed, so there are no Triton kernels")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled for the GPU that is there", allow_module_level=True)

from kernels.triton.without_gpu import compiled_for
from normkit.core.composite import (
    Composite,
    batch_then_group,
    group_and_batch,
    instance_beside_batch,
    switched,
)
from normkit.core.trace import programs_of
from normkit.kernels.activations import Activation, Kind
from normkit.kernels.triton import composite, operators, plan, primitives

HOPPER = 90
CAPABILITIES = (80, HOPPER)
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


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(plan, "_PLANS", {})


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_of_the_layers_compiles(capability):
    found = []
    for dtype, layout, shape, num_groups, examples, by_channel in STEPS:
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = (torch.zeros(shape[1], dtype=wide, requires_grad=True) for _ in range(2))
        size = shape[1] if by_channel else num_groups
        running = calls.Running(torch.zeros(size), torch.ones(size), torch.tensor(0), 0.1)
        pooling = calls.Pooling(num_groups, examples, 1e-5, by_channel)
        follower = running if examples == 0 else None
        with compiled_for(capability) as kernels:
            y, _ = nodes.normalize_pooled(operators, x, weight, bias, pooling, follower)
            y.backward(torch.zeros_like(y))
        found += kernels
    names = collections.Counter(name for name, _ in found)
    assert set(names) == KERNELS
    assert all(kernel.asm["cubin"] for _, kernel in found)


def ended_kernels(step, kind, added, capability):
    """Names and machine code of the kernels of a call both ways, by own and by given statistics."""
    dtype, layout, shape, num_groups, examples, by_channel = step
    found = []
    pooling, given = (num_groups, examples, 1e-5, by_channel), (num_groups, 1e-5)
    statistics = torch.zeros(num_groups), torch.ones(num_groups)
    for own, options in (((), calls.Pooling(*pooling)), (statistics, given)):
        x, residual = (torch.zeros(shape, dtype=dtype) for _ in range(2))
        x = x.contiguous(memory_format=layout).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = (torch.zeros(shape[1], dtype=wide, requires_grad=True) for _ in range(2))
        ending = ended_nodes.Ended(Activation(kind, 0.1), own, options)
        residual = residual.requires_grad_() if added else None
        with compiled_for(capability) as kernels:
            y, _ = ended_nodes.normalize_ended(operators, x, residual, weight, bias, ending)
            y.backward(torch.zeros_like(y))
        found += kernels
    assert all(kernel.asm["cubin"] for _, kernel in found)
    return {name for name, _ in found}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
def test_every_kernel_that_goes_on_to_an_activation_compiles(added, capability):
    kinds = (Kind.RELU, Kind.GELU, Kind.SILU, Kind.TANH)
    found = [
        ended_kernels(step, kind, added, capability)
        for step, kind in zip(STEPS, kinds, strict=True)
    ]
    assert set().union(*found) == {*KERNELS, "apply_kernel"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", list(Kind)[1:], ids=lambda kind: kind.name)
def test_every_activation_compiles(kind, capability):
    assert len(ended_kernels(STEPS[2], kind, True, capability)) > 2


COMPOSITES = {  # what is computed, and how many values each parameter has
    "batch then group": (Composite(batch_then_group, (8, 1e-5), 1e-5), (64, 64, 8, 8)),
    "group first": (Composite(group_and_batch, (8, 1e-5, "group-first"), 1e-5), (64, 64, 1)),
    "batch first": (Composite(group_and_batch, (8, 1e-5, "batch-first"), 1e-5), (64, 64, 1)),
    "parallel": (Composite(group_and_batch, (8, 1e-5, "parallel"), 1e-5), (64, 64, 1)),
    "switched": (Composite(switched, (1e-5, True), 1e-5), (64, 64, 3, 3)),
    "switched, two": (Composite(switched, (1e-5, False), 1e-5, has_batch=False), (64, 64, 2, 2)),
    "halves": (Composite(instance_beside_batch, (8, 1e-5), 1e-5, num_beside=8), (8, 8, 56, 56)),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("is_wide", [False, True], ids=["one launch", "wide groups"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_every_kernel_of_the_composites_compiles(name, is_wide, capability, monkeypatch):
    if is_wide:
        monkeypatch.setattr(composite, "COLUMNS", 4)
        monkeypatch.setattr(composite, "MOST_CELLS", 16)
    formula, sizes = COMPOSITES[name]
    x = torch.zeros(4, 64, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    sources = ("own", "given", "mixed", "example", "estimates") if name == "halves" else (
        ("own", "mixed", "estimates"))  # fmt: skip
    found = []
    for source in sources:
        programs = programs_of(formula, 64, sizes, source)
        slots = [torch.zeros(size, requires_grad=True) for size in sizes]
        slots += [None] * (4 - len(sizes))
        moments = torch.zeros(64), torch.ones(64)  # as many as there are channels, or more
        moved = (*moments, torch.tensor(0)) if source in {"own", "estimates"} else (None,) * 3
        buffers = calls.Buffers(*(moments if moved[0] is None else (None, None)), *moved)
        with compiled_for(capability) as kernels:
            y, _ = nodes.normalize_composite(
                operators, x, tuple(slots), (programs, 0.1), buffers, None
            )
            y.backward(torch.zeros_like(y))
        found += kernels
    names = collections.Counter(name for name, _ in found)
    assert set(names) == {
        "moments_kernel", "tables_kernel", "apply_kernel", "reduce_grad_kernel",
        "combine_grad_kernel",
    }  # fmt: skip
    per_way = names["tables_kernel"] / len(plan._PLANS)  # of those that differ
    assert per_way == 1 if not is_wide else 1 <= per_way <= 3
    assert all(kernel.asm["cubin"] for _, kernel in found)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("kind", [Kind.RELU, Kind.GELU], ids=lambda kind: kind.name)
def test_composites_and_positions_that_go_on_to_an_activation_compile(kind, added, capability):
    formula, sizes = COMPOSITES["batch then group"]
    x = torch.zeros(4, 64, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.zeros_like(x).requires_grad_() if added else None
    slots = tuple(torch.zeros(size, requires_grad=True) for size in sizes)
    options = programs_of(formula, 64, sizes, "own"), 0.1
    activation = Activation(kind, 0.1)
    ending = ended_nodes.Ended(activation, (), (1e-5,), of_positions=True)
    with compiled_for(capability) as found:
        y, _ = ended_nodes.normalize_ended_composite(
            operators, x, residual, slots, activation, options, calls.Buffers(), None
        )
        y.backward(torch.zeros_like(y))
        y, _ = ended_nodes.normalize_ended(operators, x, residual, *slots[:2], ending)
        y.backward(torch.zeros_like(y))
    assert all(kernel.asm["cubin"] for _, kernel in found)
    assert {name for name, _ in found} >= {
        "apply_kernel", "reduce_grad_kernel", "combine_grad_kernel", "positions_forward_kernel",
        "positions_backward_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_primitives_and_the_kernels_of_positions_compile(capability):
    x, table = torch.zeros(2, 6, 8, 8, dtype=torch.bfloat16), torch.zeros(2, 6)
    with compiled_for(capability) as found:
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
