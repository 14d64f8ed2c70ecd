"""The runs of a sweep as a CSV table for other programs."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping

from normkit.lab.records import TrainingRecord

RESULTS_NAME = "results.csv"

COLUMNS: Mapping[str, Callable[[TrainingRecord], object]] = {
    "norm": lambda run: run.spec.norm,
    "batch_size": lambda run: run.spec.batch_size,
    "seed": lambda run: run.spec.seed,
    "status": lambda run: run.outcome.status,
    "base_lr": lambda run: run.spec.protocol.base_lr,
    "score": lambda run: run.score,
    "test_accuracy": lambda run: run.outcome.test_accuracy,
    "test_accuracy_median_of_5": lambda run: run.outcome.test_accuracy_median_of_5,
    "num_epochs": lambda run: len(run.outcome.epochs),
    "num_steps": lambda run: run.outcome.num_steps,
    "num_dropped": lambda run: run.outcome.num_dropped,
    "num_parameters": lambda run: run.outcome.num_parameters,
    "step_time_s": lambda run: run.step_time_s,
    "peak_bytes": lambda run: run.outcome.peak_bytes,
    "duration_s": lambda run: run.duration_s,
    "diverged_step": lambda run: run.outcome.diverged_step,
    "message": lambda run: run.outcome.message,
}


def csv_text(records: Iterable[TrainingRecord]) -> str:
    """A row of column names, then a row for each run; a value that a run does not have is empty.

    Accuracies are shares, times in seconds, memory in bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([of(run) for of in COLUMNS.values()] for run in records)
    return text.getvalue()
