"""The runs of a sweep as a CSV table for other programs."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from normkit.lab.records import TrainingRecord

RESULTS_NAME = "results.csv"
CHANGED = "changed"

COLUMNS: Mapping[str, Callable[[TrainingRecord], object]] = {
    "norm": lambda run: run.spec.norm,
    "batch_size": lambda run: run.spec.batch_size,
    "seed": lambda run: run.spec.seed,
    "status": lambda run: run.outcome.status,
    "base_lr": lambda run: run.spec.protocol.base_lr,
    "score": lambda run: run.score,
    "score_median_of_5": lambda run: run.outcome.median_of_5,
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


def csv_text(records: Sequence[TrainingRecord], changed: Mapping[str, Sequence[str]]) -> str:
    """A row of column names, then a row for each run; a value that a run does not have is empty.

    ``changed`` has what has changed since earlier records of a run, by its key: data, files,
    normkit.

    The test scores of the runs follow at the end, each in a column ``test_NAME``. Accuracies are
    shares, times in seconds, memory in bytes.
    """
    scores = list(dict.fromkeys(name for run in records for name in run.outcome.scores))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, CHANGED, *(f"test_{name}" for name in scores)])
    for run in records:
        values = [of(run) for of in COLUMNS.values()]
        values.append(" and ".join(changed.get(run.spec.key, ())))
        writer.writerow([*values, *(run.outcome.scores.get(name) for name in scores)])
    return text.getvalue()
