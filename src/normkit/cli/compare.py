"""`normkit compare`: which norm wins at which batch size, and at what cost."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from normkit.cli.progress import line_by_line, sweep_progress
from normkit.cli.shared import (
    MAX_PROCESSES,
    flag,
    print_json,
    require_counts,
    tell_of_corrupt_lines,
    whole_numbers,
)
from normkit.cli.tables import print_tables
from normkit.lab.comparison import Comparison, compared
from normkit.lab.device import parse_device
from normkit.lab.files import usable_folder
from normkit.lab.launch import Launch, launched
from normkit.lab.lock import only_user
from normkit.lab.records import (
    RECORDS_NAME,
    TrainingRecord,
    complete_records,
    latest,
    missing_runs,
    of_data,
    read_records,
)
from normkit.lab.report import REPORT_NAME, RESULTS_NAME, write_report
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.sweep import Collected, check, default_workers, run_all
from normkit.lab.verdict import verdict_of
from normkit.spec import parse_specs

EXIT_FAILED_RUNS = 1


class _Plan(NamedTuple):
    """What is to be done, the same for all processes of a launch."""

    sweep: SweepSpec
    specs: tuple[TrainingSpec, ...]
    num_examples: int
    num_workers: int
    data_hash: str


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train one network with several norms at several batch sizes, and show which wins.

    Runs that have a record in the output folder are not repeated. Processes that torchrun started
    share the runs; the first one shows the result.
    """

    data: str = "digits"
    """Data set: digits, fashion-mnist, cifar10, cifar100 or svhn."""
    model: str = "small-resnet"
    """Network: small-resnet, mlp, vgg11, or any name of torchvision's or timm's."""
    norms: str = "bn,gn:8,bgn:auto"
    """Norms, with commas between; differences are taken to the first."""
    batch_sizes: str = "2,8,32"
    """Batch sizes, with commas between."""
    seeds: str = "1,2,3"
    """Seeds, with commas between; each cell runs all of them."""
    epochs: int = 4
    """Passes over the training data."""
    limit: int | None = None
    """Training examples to keep; all if not given."""
    base_lr: float = 0.1
    """Learning rate at batch size 128; it is scaled with the batch size."""
    weight_decay: float = 1e-4
    """Weight decay on every parameter."""
    device: str = "auto"
    """Where to compute: auto, cpu or cuda."""
    threads: int = 1
    """CPU threads of one run."""
    workers: int | None = None
    """Runs at once; as many as the machine has room for if not given."""
    out: Path = Path("runs/compare")
    """Folder for records.jsonl, report.html and results.csv."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Run what is missing, then print the table and write the report.

        Returns:
            0, or 1 if runs failed or none finished.
        """
        with redirect_stdout(sys.stderr), ExitStack() as held:  # downloads print to the output
            with launched() as launch:
                plan = launch.first(lambda: self._plan(held))
                folder = usable_folder(self.out, RECORDS_NAME)
                own = self._run_share(plan, folder, launch)
                shares = launch.gather(lambda: own)
            if not launch.is_first:
                return 0
            complete_records(folder, [record for share in shares for record in share])
            found = of_data(read_records(folder, TrainingRecord).records, plan.data_hash)
            records = latest(plan.sweep.runs(), found)
            comparison = compared(plan.sweep, records)
            write_report(folder, comparison, records, self.command())
        self._print(comparison, records)
        return _exit_code(records)

    def _plan(self, held: ExitStack) -> _Plan:
        """Check everything, take the folder, and find the runs that have no record."""
        sweep = self.sweep()
        num_workers = self._num_workers(sweep)
        dataset = check(sweep)
        folder = usable_folder(self.out, RECORDS_NAME, REPORT_NAME, RESULTS_NAME)
        held.enter_context(only_user(folder))
        contents = read_records(folder, TrainingRecord)
        tell_of_corrupt_lines(contents, folder / RECORDS_NAME)
        known = of_data(contents.records, dataset.fingerprint)
        return _Plan(
            sweep=sweep,
            specs=missing_runs(sweep.runs(), known),
            num_examples=len(dataset.train),
            num_workers=num_workers,
            data_hash=dataset.fingerprint,
        )

    def _run_share(self, plan: _Plan, folder: Path, launch: Launch) -> list[TrainingRecord]:
        """Run what falls to this process."""
        specs = launch.share(plan.specs)
        if not specs:
            return []
        show = sweep_progress if launch.is_first else line_by_line
        with show(specs, plan.num_examples) as watcher:
            collected = Collected(watcher)
            run_all(specs, folder, plan.num_workers, collected)
        return collected.records

    def sweep(self) -> SweepSpec:
        """What the options ask for.

        Raises:
            SpecError: If an option breaks its rule.
        """
        protocol = Protocol.checked(
            {
                "data": self.data,
                "model": self.model,
                "limit": self.limit,
                "epochs": self.epochs,
                "base_lr": self.base_lr,
                "weight_decay": self.weight_decay,
                "device": str(parse_device(self.device)),
                "threads": self.threads,
            },
            flag,
        )
        return SweepSpec.checked(
            {
                "protocol": protocol,
                "norms": tuple(str(spec) for spec in parse_specs(self.norms)),
                "batch_sizes": whole_numbers("--batch-sizes", self.batch_sizes),
                "seeds": whole_numbers("--seeds", self.seeds),
            },
            flag,
        )

    def command(self) -> str:
        """The command line that repeats this, every option that decides something named."""
        hidden = ("json_output", "workers")
        words = ["normkit", "compare"]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in hidden and value is not None:
                words += [flag(option.name), str(value)]
        return shlex.join(words)

    def _num_workers(self, sweep: SweepSpec) -> int:
        if self.workers is None:
            return default_workers(sweep)
        require_counts(self, "workers", at_most=MAX_PROCESSES)
        return self.workers

    def _print(self, comparison: Comparison, records: Sequence[TrainingRecord]) -> None:
        names = {"records": RECORDS_NAME, "report": REPORT_NAME, "results": RESULTS_NAME}
        paths = {kind: self.out / name for kind, name in names.items()}
        if self.json_output:
            verdict = verdict_of(comparison)
            said = {"lines": verdict.lines, **verdict.model_dump(mode="json")}
            result = {"verdict": said, **comparison.model_dump(mode="json")}
            result |= {name: str(path) for name, path in paths.items()}
            result["troubled"] = [_trouble(r) for r in records if r.outcome.status != "finished"]
            print_json(result)
        else:
            print_tables(comparison, records, paths)


def _exit_code(records: Sequence[TrainingRecord]) -> int:
    """1 if a run failed, or none has a result; that some diverge is a result."""
    ends = {record.outcome.status for record in records}
    if ends == {"diverged"}:
        sys.stderr.write(
            f"normkit: all {len(records)} runs diverged, so there is nothing to compare; give a "
            f"lower --base-lr\n"
        )
    return EXIT_FAILED_RUNS if "failed" in ends or "finished" not in ends else 0


def _trouble(record: TrainingRecord) -> dict[str, object]:
    return {
        "norm": record.spec.norm,
        "batch_size": record.spec.batch_size,
        "seed": record.spec.seed,
        "status": record.outcome.status,
        "message": record.outcome.message,
    }
