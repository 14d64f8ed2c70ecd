"""Plans: looked up by kind, started directly, bounded in number."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no Triton kernels")

from kernels.triton.without_gpu import started_on
from normkit.kernels import calls
from normkit.kernels.triton import operators, plan, pooled

HOPPER = 90


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    for plans in ("_FORWARD", "_BACKWARD", "_GIVEN", "_GIVEN_BACKWARD"):
        monkeypatch.setattr(pooled, plans, plan.Plans())


@pytest.fixture
def started():
    with started_on(HOPPER) as found:
        yield found


def map_of(shape, offset=0):
    """A map whose first element lies ``offset`` elements behind an aligned address."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + 8)[offset : offset + size].view(shape)


def forward(x, buffers=(None, None, None, 0.0)):
    weight = torch.ones(x.shape[1])
    return operators.pooled_forward(x, weight, weight, x.shape[1], 0, 1e-5, False, *buffers)


def backward(x, table):
    weight = torch.ones(x.shape[1])
    grad = torch.zeros_like(x)
    return operators.pooled_backward(grad, x, table, weight, x.shape[1], 0, 1e-5, True, True)


def same(first, second):
    """Whether two starts are of one kernel, with tensors of the same shapes and equal numbers."""

    def known(value):
        return value.shape if isinstance(value, torch.Tensor) else value

    return all(known(a) == known(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(4, 8, 5, 5), (64, 8, 64, 64)], ids=["tile", "two launches"])
def test_what_is_compiled_is_started_directly_with_the_same_arguments(shape, started):
    x, buffers = map_of(shape), (torch.zeros(8), torch.ones(8), torch.tensor(0), 0.1)
    _, table = forward(x, buffers)
    backward(x, table)
    by_triton = list(started)
    started.clear()
    forward(x, buffers)
    backward(x, table)
    assert len(by_triton) == (2 if shape[0] == 4 else 4)
    for one, other in zip(by_triton, started, strict=True):
        assert one[:2] == other[:2]
        assert same(one[2], other[2])


def test_a_map_at_another_address_modulo_16_has_its_own_plan(started):
    shape = (64, 8, 64, 64)
    forward(map_of(shape))
    forward(map_of(shape, offset=4))  # 16 bytes on: aligned
    assert len(pooled._FORWARD) == 1
    forward(map_of(shape, offset=1))
    assert len(pooled._FORWARD) == 2
    aligned, unaligned = (p.finish.start.__closure__ for p in pooled._FORWARD.values())
    assert aligned != unaligned  # of two compiled kernels


def test_plans_are_bounded(started, monkeypatch):
    monkeypatch.setattr(plan, "MOST_PLANS", 3)
    for size in range(3, 9):
        forward(map_of((2, 4, size)))
    assert len(pooled._FORWARD) == 3
    assert {kind[0][2] for kind in pooled._FORWARD} == {6, 7, 8}


def test_options_and_absent_tensors_have_their_own_plans(started):
    x, weight = map_of((2, 4, 5)), torch.ones(4)
    for given in ((weight, weight), (weight, None), (None, None)):
        for eps in (1e-5, 1e-3):
            operators.pooled_forward(x, *given, 4, 0, eps, False)
    assert len(pooled._FORWARD) == 6


def test_a_strided_map_is_copied_before_its_plan_runs(started):
    x = torch.zeros(2, 4, 6, 10)[:, :, ::2, ::5]
    y, _ = forward(x)
    assert y.shape == x.shape
    name, _, arguments = started[-1]
    assert name == "tile_forward_kernel"
    assert arguments[0].is_contiguous()


def test_every_kind_of_call_takes_at_most_two_launches_each_way(started):
    shape = (8, 64, 57, 56)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(shape).contiguous(memory_format=layout)
        for num_groups, examples in ((64, 0), (64, 1), (1, 1), (8, 1), (2, 0), (64, 2), (8, 3)):
            started.clear()
            weight, pooling = torch.ones(64), (num_groups, examples, 1e-5)
            _, table = operators.pooled_forward(x, weight, weight, *pooling, False)
            ways = [len(started)]
            operators.pooled_backward(x, x, table, weight, *pooling, True, True)
            ways.append(len(started) - ways[0])
            assert max(ways) <= 2, (num_groups, examples, layout, [name for name, *_ in started])
            started.clear()
        mean = torch.zeros(64)
        operators.evaluate_forward(x, mean, mean, weight, weight, 64, 1e-5)
        assert len(started) == 1
        operators.evaluate_backward(x, x, mean, mean, weight, 64, 1e-5, True, True)
        assert len(started) == 3


def test_the_kinds_say_all_that_calls_decides():
    assert calls.Pooling._fields == (
        "num_groups", "examples_per_group", "eps", "channel_statistics",
    )  # fmt: skip
