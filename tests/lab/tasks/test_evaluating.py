"""Evaluations that two processes share: the numbers of one process, and no waiting for ever."""

import pytest

from distributed.processes import results
from lab.tasks.evaluating import JOBS
from normkit.lab.evaluation import shared_out_singly


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results("lab.tasks.evaluating", 2, tmp_path_factory.mktemp("evaluating"), *JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_find_what_one_does(found, name):
    expected = JOBS[name](0, 1)
    assert len({*expected.values()}) > 1
    for own in found:
        assert own[name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("number", "size"), [(1, 2), (5, 2), (6, 2), (7, 4), (9, 1)])
def test_processes_evaluate_equally_many_examples_and_each_counts_once(number, size):
    shares = [shared_out_singly(number, rank, size) for rank in range(size)]
    assert len({len(own) for own in shares}) == 1
    counted = sorted(at for own in shares for at, counts in own if counts)
    times = 1 if number >= size else size
    assert counted == sorted([*range(number)] * times)
