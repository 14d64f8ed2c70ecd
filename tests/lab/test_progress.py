"""The line that a run of `normkit compare` leaves in the terminal."""

import pytest

from normkit.cli.progress import _line, sweep_progress
from normkit.lab.spec import Protocol


@pytest.mark.parametrize(
    ("scores", "train", "said"),
    [
        ({"accuracy": 0.25, "loss": 1.5}, None, "25.00 % in 0.1 s"),
        ({"ap": 0.5, "small": None}, None, "50.00 % in 0.1 s"),
        ({"loss": 1.5, "best": None}, "my.py:train", "loss 1.5 in 0.1 s"),
        ({"ap": None}, None, "finished: its score is not finite"),
    ],
)
def test_a_finished_run_is_told_by_the_score_that_is_compared(record, scores, train, said):
    found = record(scores=scores, protocol=Protocol(train=train))
    assert _line(found) == f"bn, batch size 10, seed 1: {said}"


def test_a_run_that_diverged_says_where(record):
    found = record(status="diverged", message="the loss was nan", accuracy=None)
    assert _line(found).endswith("seed 1: diverged: the loss was nan")


@pytest.mark.parametrize(
    ("number", "said"), [(1, "1 run begins; it has a line"), (3, "3 runs begin; each has a line")]
)
def test_without_a_terminal_a_line_says_that_runs_begin(record, number, said, capsys):
    with sweep_progress([record().spec] * number, 100):
        assert capsys.readouterr().err.startswith(f"{said} here when it ends\n")
