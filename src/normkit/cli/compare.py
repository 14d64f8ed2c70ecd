"""`normkit compare`: which norm is best at which batch size, and at what cost."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from normkit.cli.options import Json
from normkit.cli.progress import sweep_progress
from normkit.cli.recipe import Given, RecipeOptions
from normkit.cli.shared import flag, print_json, require_counts, tell_of_corrupt_lines
from normkit.cli.tables import print_tables
from normkit.lab.config import asked
from normkit.lab.dry_run import DryRun, dry_run_of
from normkit.lab.experiment import Result, perform
from normkit.lab.files import usable_folder
from normkit.lab.launch import is_spoken_for
from normkit.lab.records import RECORDS_NAME, TrainingRecord, read_records
from normkit.lab.report import REPORT_NAME, RESULTS_NAME
from normkit.lab.work import MAX_PROCESSES

EXIT_FAILED_RUNS = 1
NOT_REPEATED = ("json_output", "workers", "dry_run", "data_workers")  # do not change the report


@dataclass(frozen=True, kw_only=True)
class Compare(RecipeOptions):
    """Train one network with several norms at several batch sizes, and show which is best.

    Runs that have a record in the output folder are not repeated, unless the data, the model's
    source or normkit has changed. Processes that torchrun started train each network together.
    """

    norms: str | None = None
    """Norms, or arms such as xbn/gn:64, ibn-a or none (normkit list), separated by commas; the
    others are compared with the first (default: bn,gn:8,bgn:auto)."""
    batch_sizes: str | None = None
    """Examples that a norm sees at a time, separated by commas (default: 2,8,32)."""
    seeds: str | None = None
    """Seeds, separated by commas; each norm and batch size runs all of them (default: 1,2,3)."""
    tune_lr: str | None = None
    """Learning rates in place of --base-lr, separated by commas: each norm at each batch size gets
    the one that is best on validation data."""
    tune_seeds: int | None = None
    """How many of the seeds, from the first on, all learning rates run with; the others run with
    the rate that is chosen only (default: all)."""
    device: str | None = None
    """Where to compute: auto, cpu or cuda (default: auto)."""
    workers: int | None = None
    """Runs at the same time; by default as many as the machine has room for."""
    data_workers: int | None = None
    """Processes of each run that read pictures ahead (default: 0)."""
    cluster: Literal["ray"] | None = None
    """Run on a Ray cluster: that of RAY_ADDRESS, or one that is started here."""
    checkpoint_seconds: float | None = None
    """Seconds between two checkpoints of a run, from which it continues after it was killed
    (default: 60)."""
    save_weights: Given = False
    """Write the trained weights to the folder weights beside the records."""
    no_save_weights: Given = False
    """Do not write the weights, even if the file given by --config says so."""
    loggers: str | None = None
    """Loggers of each epoch's values, separated by commas: tensorboard, csv, wandb, mlflow."""
    probe_every: int | None = None
    """Steps between two records of a probe on the network, whose numbers go to --loggers (default:
    no probe)."""
    dry_run: Given = False
    """Train nothing: print runs and steps, and time and memory estimated from measured steps."""
    out: Path | None = None
    """Folder for records.jsonl, results.csv, report.html and experiment.toml (default:
    runs/compare)."""
    json_output: Json = False
    """Print the result as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Run what is missing, then print the table and write the report.

        Returns:
            0, or 1 if runs failed or none finished.
        """
        with redirect_stdout(sys.stderr):  # downloads print to the output
            found = self._done()
        if is_spoken_for():
            return 0
        if isinstance(found, DryRun):
            self._print_dry_run(found)
            return 0
        self._print(found)
        return _exit_code(found.records)

    def _done(self) -> Result | DryRun:
        require_counts(self, "workers", at_most=MAX_PROCESSES)
        sweep, options = asked(self.values(), flag)
        way = options.way(self.command(options.out))
        if self.dry_run:
            return dry_run_of(sweep, way.out)
        if way.out.exists():
            usable_folder(way.out, RECORDS_NAME, RESULTS_NAME, REPORT_NAME)
        tell_of_corrupt_lines(read_records(way.out, TrainingRecord), way.out / RECORDS_NAME)
        return perform(sweep, way, sweep_progress, _tell)

    def command(self, out: str) -> str:
        """The command line that repeats this run, with every option that was given.

        Args:
            out: The output folder.
        """
        words = ["normkit", "compare"]
        for option in fields(self):
            value = out if option.name == "out" else getattr(self, option.name)
            if option.name in NOT_REPEATED or value == option.default:
                continue
            words += [flag(option.name)] + ([] if value is True else [str(value)])
        return shlex.join(words)

    def _print_dry_run(self, found: DryRun) -> None:
        if self.json_output:
            print_json(found.rows())
        else:
            sys.stdout.write(f"{found}\n")

    def _print(self, result: Result) -> None:
        comparison, records = result.comparison, result.records
        names = {"records": RECORDS_NAME, "results": RESULTS_NAME, "report": REPORT_NAME}
        paths = {name: result.folder / file for name, file in names.items()}
        if self.json_output:
            found = comparison.model_dump(mode="json")
            verdict = result.verdict
            found["verdict"] = verdict.model_dump(mode="json") | {"lines": verdict.lines}
            found |= {name: str(path) for name, path in paths.items()}
            found["troubled"] = [_as_json(r) for r in records if r.outcome.status != "finished"]
            print_json(found)
        else:
            print_tables(comparison, records, paths)


def _tell(note: str) -> None:
    sys.stderr.write(f"normkit: {note}\n")


def _exit_code(records: Sequence[TrainingRecord]) -> int:
    """1 if a run failed, or if no run finished; otherwise 0, because divergence is a result."""
    ends = {record.outcome.status for record in records}
    if ends == {"diverged"}:
        sys.stderr.write(
            f"normkit: all {len(records)} runs diverged, so there is nothing to compare; give a "
            f"lower --base-lr\n"
        )
    return EXIT_FAILED_RUNS if "failed" in ends or "finished" not in ends else 0


def _as_json(record: TrainingRecord) -> dict[str, object]:
    return {
        "norm": record.spec.norm,
        "batch_size": record.spec.batch_size,
        "seed": record.spec.seed,
        "status": record.outcome.status,
        "message": record.outcome.message,
    }
