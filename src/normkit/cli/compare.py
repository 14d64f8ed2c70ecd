"""`normkit compare`: which norm is best at which batch size, and at what cost."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from normkit.cli.progress import sweep_progress
from normkit.cli.recipe import Given, RecipeOptions
from normkit.cli.shared import (
    decimals,
    flag,
    print_json,
    require_counts,
    tell_of_corrupt_lines,
    whole_numbers,
)
from normkit.cli.tables import print_estimates, print_tables
from normkit.errors import SpecError
from normkit.lab.arms import parse_arms
from normkit.lab.check import check
from normkit.lab.config import options_of, sweep_of
from normkit.lab.device import parse_device
from normkit.lab.dry_run import estimate
from normkit.lab.experiment import Result, perform
from normkit.lab.files import usable_folder
from normkit.lab.launch import is_spoken_for, num_launched
from normkit.lab.own_norms import register_norms
from normkit.lab.records import RECORDS_NAME, TrainingRecord, read_records
from normkit.lab.report import REPORT_NAME, RESULTS_NAME
from normkit.lab.spec import SweepSpec
from normkit.lab.task import parse_task
from normkit.lab.work import MAX_PROCESSES

EXIT_FAILED_RUNS = 1
DEFAULTS = {"norms": "bn,gn:8,bgn:auto", "batch_sizes": "2,8,32", "seeds": "1,2,3"}
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
    dry_run: Given = False
    """Train nothing: print runs and steps, and time and memory estimated from measured steps."""
    out: Path | None = None
    """Folder for records.jsonl, results.csv, report.html and experiment.toml (default:
    runs/compare)."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Run what is missing, then print the table and write the report.

        Returns:
            0, or 1 if runs failed or none finished.
        """
        if self.dry_run:
            return self._estimate()
        with redirect_stdout(sys.stderr):  # downloads print to the output
            require_counts(self, "workers", at_most=MAX_PROCESSES)
            values = self.values()
            sweep, options = self.sweep(values), options_of(values, flag)
            way = options.way(self.command(options.out))
            if way.out.exists():
                usable_folder(way.out, RECORDS_NAME, RESULTS_NAME, REPORT_NAME)
            tell_of_corrupt_lines(read_records(way.out, TrainingRecord), way.out / RECORDS_NAME)
            result = perform(sweep, way, sweep_progress, _tell)
        if is_spoken_for():
            return 0
        self._print(result)
        return _exit_code(result.records)

    def sweep(self, given: Mapping[str, Any]) -> SweepSpec:
        """The sweep that the options describe.

        Args:
            given: The options of the command line and the file, by name.

        Raises:
            SpecError: If an option breaks its rule.
        """
        values = dict(given)
        lists = DEFAULTS | {name: getattr(self, name) for name in DEFAULTS if getattr(self, name)}
        register_norms(values.get("own_norms", ()))
        if self.norms or "norms" not in values:
            values["norms"] = tuple(str(arm) for arm in parse_arms(lists["norms"]))
        for name in ("batch_sizes", "seeds"):
            if getattr(self, name) or name not in values:
                values[name] = whole_numbers(flag(name), lists[name])
        if self.tune_lr is not None:
            values["learning_rates"] = decimals("--tune-lr", self.tune_lr)
        device = self.device or values.get("device", "auto")
        values["device"] = str(parse_device(device))
        values["processes"] = num_launched()
        return sweep_of(values, flag)

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

    def _estimate(self) -> int:
        with redirect_stdout(sys.stderr):  # downloads print to the output
            sweep = self.sweep(self.values())
            dataset = check(sweep)
            if dataset is None:
                raise SpecError(
                    "--dry-run was given with --train, but only the function knows its steps; "
                    "leave --dry-run out, or try one norm, batch size and seed"
                )
            found = estimate(sweep, parse_task(sweep.protocol.task).sample(sweep.protocol).data)
        if self.json_output:
            print_json([cell.model_dump() | {"duration_s": cell.duration_s} for cell in found])
        else:
            print_estimates(found)
        return 0

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
