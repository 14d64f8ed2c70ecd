import pytest

from normkit.lab.comparison import compared
from normkit.lab.records import latest


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds(sweep, record):
    records = [record(seed=1, accuracy=0.5), record(seed=2, accuracy=0.7)]
    accuracy = compared(sweep, records).cell("bn", 10).accuracy
    assert accuracy.mean == pytest.approx(0.6)
    assert accuracy.spread == pytest.approx(0.02**0.5)  # ((0.1)^2 + (0.1)^2) / (2 - 1)
    assert accuracy.num_seeds == 2


def test_one_seed_has_no_spread(sweep, record):
    accuracy = compared(sweep, [record(accuracy=0.5)]).cell("bn", 10).accuracy
    assert (accuracy.mean, accuracy.spread) == (0.5, None)


def test_differences_are_taken_seed_by_seed(sweep, record):
    records = [
        record(seed=1, accuracy=0.1),
        record(seed=2, accuracy=0.9),
        record(norm="ln", seed=1, accuracy=0.2),
        record(norm="ln", seed=2, accuracy=1.0),
    ]
    comparison = compared(sweep, records)
    difference = comparison.cell("ln", 10).difference
    assert difference.mean == pytest.approx(0.1)
    assert difference.spread == pytest.approx(0, abs=1e-12)  # though each norm's own is 0.57
    assert comparison.cell("bn", 10).difference is None


def test_a_seed_that_only_one_norm_finished_is_in_no_difference(sweep, record):
    diverged = record(seed=2, accuracy=None, status="diverged", diverged_step=3)
    others = [record("ln", seed=s, accuracy=0.6) for s in (1, 2)]
    comparison = compared(sweep, [record(seed=1, accuracy=0.5), diverged, *others])
    assert comparison.cell("ln", 10).difference.num_seeds == 1
    cell = comparison.cell("bn", 10)
    assert (cell.num_finished, cell.num_diverged, cell.num_failed) == (1, 1, 0)


def test_cells_without_runs_are_empty_but_there(sweep, record):
    comparison = compared(sweep, [record()])
    assert len(comparison.cells) == 4
    cell = comparison.cell("ln", 20)
    assert (cell.accuracy, cell.step_time_s, cell.peak_bytes) == (None, None, None)


def test_the_latest_record_of_a_run_counts_and_other_sweeps_do_not(sweep, record):
    failed = record(status="failed", accuracy=None)
    foreign = record(batch_size=11)
    assert latest(sweep.runs(), [failed, foreign, record()]) == (record(),)


def test_cost_is_the_median_time_and_the_highest_peak(sweep, record):
    records = [
        record(seed=1, peak_bytes=10).model_copy(update={"step_time_s": 1.0}),
        record(seed=2, peak_bytes=30).model_copy(update={"step_time_s": 2.0}),
    ]
    cell = compared(sweep, records).cell("bn", 10)
    assert (cell.step_time_s, cell.peak_bytes) == (1.5, 30)


def test_every_other_score_is_summarised_by_name_where_it_is_there(sweep, record):
    def scored(**scores):
        one = record(seed=len(scores), accuracy=0.5)
        return one.model_copy(update={"outcome": one.outcome.model_copy(update={"scores": scores})})

    records = [
        scored(robust=0.2),
        scored(robust=0.4, clean=None),
    ]
    assert compared(sweep, records).further == ()
    records = [scored(robust=0.2, clean=0.7), scored(robust=0.4)]
    comparison = compared(sweep, records)
    cell = comparison.cell("bn", 10)
    assert comparison.further == ("clean",)
    assert cell.accuracy.mean == pytest.approx(0.3)
    assert (cell.further["clean"].mean, cell.further["clean"].num_seeds) == (0.7, 1)
    assert cell.row()["test_clean"] == 0.7
    assert "test_clean" not in comparison.cell("ln", 10).row()
