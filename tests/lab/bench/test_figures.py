import math

import pytest
import torch

from normkit.lab.bench.records import BenchRecord, Entry, Row
from normkit.lab.bench.spec import RESNET50, BenchSpec
from normkit.lab.bench.subject import Memory
from normkit.lab.bench.summary import cells_of, targets_of
from normkit.lab.bench.timing import Budget, Call, Times, percentile, summarise, time_in_turns
from normkit.lab.environment import Environment

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([0.0, 10.0], 0.2, 2.0),  # between two neighbours
        ([5, 1, 4, 2, 3, 0], 0.8, 4.0),
        ([7.0], 0.8, 7.0),  # one value is every percentile
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_percentiles_are_linear_between_neighbours(values, share, expected):
    assert percentile(values, share) == pytest.approx(expected)


def test_times_are_summed_up_by_median_and_outer_percentiles():
    times = summarise([0.5, 0.1, 0.2, 0.3, 0.4, 9.0])
    assert (times.median_s, times.low_s, times.high_s) == pytest.approx((0.35, 0.2, 0.5))
    assert times.repeats == 6


def test_calls_take_turns_and_the_order_alternates():
    seen = []
    calls = {
        name: Call(run=lambda n=name: seen.append(n), prepare=lambda n=name: seen.append(f"-{n}"))
        for name in "ab"
    }
    times = time_in_turns(calls, Budget(seconds=0, repeats=3), CPU)
    warm_up, rounds = seen[:8], seen[8:]
    assert warm_up == ["-a", "a", "-b", "b"] * 2
    assert rounds == ["-b", "b", "-a", "a", "-a", "a", "-b", "b", "-b", "b", "-a", "a"]
    assert times["a"].repeats == 3


@pytest.mark.parametrize(("seconds", "repeats", "expected"), [(0, 100, 5), (60, 7, 7)])
def test_rounds_end_with_the_budget_but_not_before_a_few(seconds, repeats, expected):
    budget = Budget(seconds=seconds, repeats=repeats)
    assert time_in_turns({"a": Call(run=list)}, budget, CPU)["a"].repeats == expected


def times_of(seconds):
    return Times(median_s=seconds, low_s=seconds, high_s=seconds, repeats=5)


def entry(seconds, kept=0):
    memory = Memory(kept_bytes=kept, peak_bytes=2 * kept)
    both = times_of(3 * seconds)
    return Entry(name="x", forward=times_of(seconds), forward_backward=both, memory=memory)


def record_of(ratios, norm="bn", peer="torch", kept=1.0):
    """One row for each of ResNet-50's shapes, and the peer's time divided by ours."""
    rows = []
    for (size, shape), ratio in zip(
        [(size, shape) for size in (2, 32) for shape in RESNET50], ratios, strict=True
    ):
        num_bytes = 4 * size * math.prod(shape)
        entries = {
            "ours": entry(1.0, int(kept * num_bytes)),
            peer: entry(ratio, num_bytes),
            "copy": entry(0.5),
        }
        rows.append(
            Row(norm=norm, batch_size=size, shape=shape, map_bytes=num_bytes, kernels="cpu",
                entries=entries)
        )  # fmt: skip
    spec = BenchSpec(norms=(norm,), maps=RESNET50, batch_sizes=(2, 32), threads=2)
    environment = Environment(
        torch="2", python="3", platform="p", device="cpu", threads=2, date="2026-01-01"
    )
    return BenchRecord(
        spec=spec, rows=tuple(rows), environment=environment, code_hash="0" * 12,
        duration_s=1.0, load_average=0.0,
    )  # fmt: skip


def test_a_cell_has_the_geometric_mean_and_the_slowest_shape():
    ratios = [2.0, 8.0] * 6 + [4.0] * 12
    first, second = cells_of(record_of(ratios))
    assert first.forward.geometric_mean == pytest.approx(4.0)
    assert first.forward.slowest == 2.0
    assert first.forward.slowest_shape == RESNET50[0]
    assert first.copies == pytest.approx(2.0)
    assert first.kept == first.peak == pytest.approx(1.0)
    assert (second.batch_size, second.forward_backward.geometric_mean) == (32, pytest.approx(4.0))


@pytest.mark.parametrize(
    ("norm", "peer", "ratios", "held"),
    [
        ("bn", "torch", [2.6] * 24, [True, True, True, True]),
        ("bn", "torch", [2.6] * 23 + [0.9], [True, False, True, False]),  # 2.49 on average
        ("gn:32", "torch", [1.06] * 24, [True, True, True, True]),
        ("gn:32", "torch", [1.2] * 23 + [0.89], [True, True, True, False]),
        ("bgn:32", "composition", [2.9] * 24, [True, False]),
    ],
)
def test_targets_are_held_or_missed(norm, peer, ratios, held):
    targets = targets_of(record_of(ratios, norm, peer))
    assert [target.held for target in targets] == held


def test_a_second_map_kept_for_backward_is_a_missed_target():
    kept, *_ = targets_of(record_of([3.0] * 24, kept=2.0))
    assert (kept.held, kept.measured) == (False, "x and at most 1e+02 % of it")


def test_a_record_for_other_conditions_is_not_judged():
    record = record_of([3.0] * 24)
    spec = record.spec.model_copy(update={"dtype": "bfloat16"})
    assert targets_of(record.model_copy(update={"spec": spec})) == []
