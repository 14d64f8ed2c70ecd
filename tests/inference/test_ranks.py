"""Recalibration on two processes that talk through gloo, against one that has all data."""

import pytest
from torch.testing import assert_close

import normkit as nk
from distributed.processes import results
from inference.ranks_worker import PROCESSES, SPLITS, batches_of, examples, net

pytestmark = pytest.mark.xdist_group("ranks")  # the processes are started once


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    found = results("inference.ranks_worker", PROCESSES, folder, "recalibrated")
    return [each["recalibrated"] for each in found]


def rows_of(patch):
    return {row.name: [row.num_values, *row.new.values()] for row in patch.layers}


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
@pytest.mark.parametrize("split", SPLITS)
def test_ranks_find_together_what_one_finds_alone(split, sequential, outcomes):
    batches = [batch for rank in range(PROCESSES) for batch in batches_of(split, rank)]
    expected = rows_of(nk.recalibrate(net(), batches, sequential=sequential))
    if sequential:
        whole = rows_of(nk.recalibrate(net(), [examples()], sequential=True))
        assert_close(expected["3.batch"][1:3], whole["3.batch"][1:3], rtol=1e-6, atol=1e-6)
    for found in (outcome[split, sequential] for outcome in outcomes):
        assert found.pop("num_batches") == len(batches)
        assert list(found) == ["1", "3.batch"]
        for name, values in expected.items():
            assert_close(found[name], values, rtol=1e-6, atol=1e-6)
    first, other = (outcome[split, sequential] for outcome in outcomes)
    assert_close(first, other, rtol=0, atol=0)


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in order"])
def test_a_failure_of_one_rank_is_one_of_all(sequential, outcomes):
    other, own = (outcome["broken", sequential] for outcome in outcomes)
    assert own == "OSError: the disk is gone"
    assert other == (
        "DataError: rank 1 failed with OSError: the disk is gone; the other ranks stop as well"
    )


def test_no_batch_at_all_and_a_foreign_group_are_refused(outcomes):
    for outcome in outcomes:
        assert outcome["no batch"].startswith("DataError: batches= gave no batch")
        assert outcome["other group"].startswith("OptionError: this process is not in the group=")


def test_a_group_of_one_has_its_own_statistics(outcomes):
    for rank, outcome in enumerate(outcomes):
        expected = rows_of(nk.recalibrate(net(), batches_of("even", rank)))
        for name, values in expected.items():
            assert_close(outcome["own group"][name], values, rtol=0, atol=0)
