"""Plans: looked up by kind, carried out with the compiled kernels themselves, bounded in number."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no Triton kernels")

from kernels.triton.without_gpu import started_on
from normkit.core.composite import Composite, batch_then_group
from normkit.core.trace import programs_of
from normkit.kernels.triton import composite, operators, plan, pooled

HOPPER = 90


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(plan, "_PLANS", {})


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


def test_a_plan_gives_kernels_the_addresses_of_this_calls_tensors(started):
    shape, counter = (64, 8, 64, 64), torch.tensor(0)
    for again in range(2):
        started.clear()
        x, weight, bias = map_of(shape), torch.ones(8), torch.zeros(8)
        mean, var = torch.zeros(8), torch.ones(8)
        y, table = operators.pooled_forward(
            x, weight, bias, 8, 0, 1e-5, False, mean, var, counter, 0.5**again
        )
        (_, _, measured), (_, _, normalized) = started
        if not again:
            continue
        assert measured[0] == x.data_ptr()
        parts = measured[1]
        tensors = (x, y, weight, bias)
        assert normalized[:4] == tuple(t.data_ptr() for t in tensors)
        assert normalized[4:6] == (parts, parts)  # what the first leaves is what the second reads
        assert normalized[6:10] == tuple(t.data_ptr() for t in (table, mean, var, counter))
        assert normalized[10:12] == (0.5, 0.0)  # the rate of this call
    assert len(plan._PLANS) == 1


@pytest.mark.parametrize("shape", [(4, 8, 5, 5), (64, 8, 64, 64)], ids=["tile", "two launches"])
def test_what_triton_has_compiled_is_started_with_the_same_numbers(shape, started):
    x, buffers = map_of(shape), (torch.zeros(8), torch.ones(8), torch.tensor(0), 0.1)
    for again in range(2):
        _, table = forward(x, buffers)
        backward(x, table)
        if not again:
            by_triton = list(started)
            started.clear()
    assert len(by_triton) == (2 if shape[0] == 4 else 4)
    for one, other in zip(by_triton, started, strict=True):
        assert one[:2] == other[:2]
        for first, second in zip(one[2], other[2], strict=True):
            assert isinstance(first, torch.Tensor) or first == second


def test_threads_that_start_a_plan_for_the_first_time_at_once_do_not_disturb_each_other(started):
    x = map_of((4, 8, 5, 5))
    found = []
    for is_first in (True, True, False):
        for one in next(iter(plan._PLANS.values()))._launches if plan._PLANS and is_first else ():
            one.start = None  # as another thread sees it while the first one compiles
        started.clear()
        forward(x)
        ((_, _, arguments),) = started
        found.append([a for a in arguments if isinstance(a, int | float) and not a > 2**16])
    assert found[0] == found[1]
    assert found[2][-len(found[0]) :] == found[0]


def test_maps_of_changing_size_need_few_kernels():
    """Of 840 kinds of call: constants are mostly powers of two, so that compilation ends."""
    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        for size in product(range(3, 60, 4), range(5, 40, 5), (2, 24)):
            height, width, batch_size = size
            x = torch.empty(batch_size, 64, height, width, device="meta")
            x = x.contiguous(memory_format=layout)
            for num_groups, examples in ((64, 0), (8, 1)):
                options = num_groups, examples, 1e-5, False
                made = plan.Plan(pooled.forward, (x, *(None,) * 6), options)
                for one in made._launches:
                    constants = tuple(one.constants.items())
                    found.setdefault(one.kernel.__name__, set()).add((one.num_warps, constants))
    assert found.keys() == {
        "tile_forward_kernel",
        "measure_groups_kernel",
        "normalize_groups_kernel",
    }
    assert max(map(len, found.values())) < 100


def test_a_map_at_another_address_modulo_16_has_its_own_plan(started):
    shape = (64, 8, 64, 64)
    forward(map_of(shape))
    forward(map_of(shape, offset=4))  # 16 bytes on: aligned
    assert len(plan._PLANS) == 1
    forward(map_of(shape, offset=1))
    assert len(plan._PLANS) == 2
    aligned, unaligned = (p._launches[0].start.func for p in plan._PLANS.values())
    assert aligned != unaligned  # of two compiled kernels


def test_a_tensor_on_another_device_never_reaches_a_kernel(started):
    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    x, weight = map_of((4, 8, 5, 5)), torch.ones(8)
    elsewhere = weight.as_subclass(Elsewhere)
    options = 8, 0, 1e-5, False
    operators.pooled_forward(x, weight, weight, *options)  # there is a plan for such shapes
    started.clear()
    for tensors in ((x, elsewhere, weight), (x, weight, elsewhere)):
        with pytest.raises(RuntimeError, match=r"on one device; these are on .*move the layer"):
            operators.pooled_forward(*tensors, *options)
    assert not started


def test_plans_are_bounded(started, monkeypatch):
    monkeypatch.setattr(plan, "MOST_PLANS", 3)
    for size in range(3, 9):
        forward(map_of((2, 4, size)))
    assert len(plan._PLANS) == 3
    assert {kind[2][2] for kind in plan._PLANS} == {6, 7, 8}


def test_options_and_absent_tensors_have_their_own_plans(started):
    x, weight = map_of((2, 4, 5)), torch.ones(4)
    for given in ((weight, weight), (weight, None), (None, None)):
        for eps in (1e-5, 1e-3):
            operators.pooled_forward(x, *given, 4, 0, eps, False)
    assert len(plan._PLANS) == 6


def test_a_rate_that_changes_with_every_step_needs_no_new_plan(started):
    x, mean, var = map_of((4, 16, 3, 3)), torch.zeros(16), torch.ones(16)
    programs = programs_of(Composite(batch_then_group, (4, 1e-5), 1e-5), 16, (16,) * 4, "estimates")
    for step in range(1, 4):
        forward(x, (mean, var, None, 1 / step))
        slots, buffers = (mean, var, mean, var), (None, None, mean, var, None)
        _, table = composite.forward(x, programs.forward, slots, 1 / step, buffers)
        composite.backward(x, x, table, programs.backward, slots, 1 / step, 15)
    assert len(plan._PLANS) == 3


def test_a_strided_map_is_copied_before_its_plan_runs(started):
    for _ in range(2):
        x = torch.zeros(2, 4, 6, 10)[:, :, ::2, ::5]
        y, _ = forward(x)
    assert y.shape == x.shape
    assert y.is_contiguous()
    _, _, arguments = started[-1]
    assert arguments[0] != x.data_ptr()


def doubled(x):
    y = x.new_empty(x.shape)
    return y.mul_(2)


def halved(x):
    return x.new_empty((2, *x.shape))[0]


def test_what_a_plan_cannot_carry_out_is_refused():
    with pytest.raises(RuntimeError, match="it may only allocate, view and launch"):
        plan.planned(doubled, (torch.zeros(3),))
    with pytest.raises(RuntimeError, match="shares memory with another"):
        plan.planned(halved, (torch.zeros(3),))


def test_every_kind_of_call_takes_at_most_two_launches_each_way(started):
    shape = (8, 64, 57, 56)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(shape).contiguous(memory_format=layout)
        cuts = ((64, 0), (64, 1), (1, 1), (8, 1), (2, 0), (64, 2), (8, 3), (96, 2), (7, 0))
        for (num_groups, examples), channels in product(cuts, (False, True)):
            started.clear()
            weight, pooling = torch.ones(64), (num_groups, examples, 1e-5)
            _, table = operators.pooled_forward(x, weight, weight, *pooling, channels)
            ways = [len(started)]
            operators.pooled_backward(x, x, table, weight, *pooling, True, True)
            ways.append(len(started) - ways[0])
            assert max(ways) <= 2, (num_groups, examples, layout, [name for name, *_ in started])
            if channels or layout is torch.channels_last:  # which endings do not change
                continue
            needs = (weight, weight, *pooling, 3, 0.0)
            operators.ended_forward(x, x, *needs[:5], channels, *needs[5:])
            ways.append(len(started) - sum(ways))
            operators.ended_backward(x, x, table, x, None, *needs, True, True, True)
            ways.append(len(started) - sum(ways))
            assert max(ways) <= 2, (num_groups, examples, layout, [name for name, *_ in started])
        started.clear()
        mean = torch.zeros(64)
        operators.evaluate_forward(x, mean, mean, weight, weight, 64, 1e-5)
        assert len(started) == 1
        operators.evaluate_backward(x, x, mean, mean, weight, 64, 1e-5, True, True)
        assert len(started) == 3
        started.clear()
        _, table = operators.positional_forward(x, weight, weight, 1e-5)
        assert len(started) == 1
        operators.positional_backward(x, x, table, weight, 1e-5, True, True)
        assert len(started) == 3
