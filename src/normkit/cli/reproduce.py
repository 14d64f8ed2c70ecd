"""`normkit reproduce`: repeats the papers' figures and tables, and judges their claims."""

import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from normkit.cli.options import Json
from normkit.cli.presets import print_list, print_table_estimates
from normkit.cli.progress import sweep_progress
from normkit.cli.shared import (
    print_json,
    require_counts,
    require_seconds,
    tell_of_corrupt_lines,
)
from normkit.errors import DataError, SpecError
from normkit.lab.device import parse_device
from normkit.lab.files import usable_folder
from normkit.lab.launch import is_spoken_for
from normkit.lab.records import RECORDS_NAME, read_records
from normkit.lab.reproduce import (
    PRESETS,
    Preset,
    Result,
    Scale,
    as_markdown,
    as_text,
    conclude,
    find_preset,
    measured,
    read_result,
    results_in,
    run_missing,
    write_result,
)
from normkit.lab.reproduce.dry_run import estimate_preset
from normkit.lab.reproduce.tables.catalog import find_table
from normkit.lab.reproduce.tables.catalog import tables as known_tables
from normkit.lab.reproduce.tables.dry_run import estimate_table
from normkit.lab.reproduce.tables.figure import draw_table
from normkit.lab.reproduce.tables.page import table_markdown, table_text
from normkit.lab.reproduce.tables.result import TableResult, table_results_in, write_table
from normkit.lab.reproduce.tables.run import run_table
from normkit.lab.reproduce.tables.table import Table
from normkit.lab.reproduce.tasks.records import PresetRecord, PresetSpec
from normkit.lab.resume import SECONDS
from normkit.lab.sweep import reached
from normkit.lab.work import MAX_PROCESSES, Upkeep, Way

ALL = "all"
NAMES = tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="(default: list the presets)")
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Repeat figures and tables of the papers, and judge their claims by the results.

    A claim held if the 95 % interval of its number over the seeds fulfils it, did not hold if the
    interval contradicts it, and is not decided otherwise. Runs that have a record are not repeated.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, NAMES] = ()
    """Presets, or all."""
    scale: Scale = "small"
    """small takes minutes for each preset on one core, tiny seconds, paper the paper's settings."""
    out: Path = Path("runs/reproduce")
    """Folder for records.jsonl, and for each preset reproduce-NAME.json and its figure."""
    figure: Literal["svg", "png", "pdf"] = "svg"
    """File format of the figure."""
    device: str = "cpu"
    """Where each run computes: auto, cpu or cuda."""
    workers: int | None = None
    """Runs at the same time; by default as many as the machine has room for."""
    cluster: Literal["ray"] | None = None
    """Run on a Ray cluster: that of RAY_ADDRESS, or one that is started here."""
    checkpoint_seconds: float = SECONDS
    """Seconds between two checkpoints of a run, from which it continues after it was killed."""
    dry_run: Flag = False
    """Train nothing: build every arm as the scale says, take a step of each on random pictures, and
    print runs, steps, time, memory, and which data are missing."""
    list_presets: Annotated[
        bool, tyro.conf.arg(name="list", help_behavior_hint=""), tyro.conf.FlagCreatePairsOff
    ] = False
    """List the presets and the claims of each, and run nothing."""
    report: Flag = False
    """Print the tables of all results in the folder as Markdown, and run nothing."""
    json_output: Json = False
    """Print JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Run what is missing, judge, write, print.

        Returns:
            0; a claim that did not hold is a result, not a failure.

        Raises:
            NormError: If a preset or scale is unknown, or the folder cannot be used.
        """
        presets, tables = self._presets(), self._tables()
        if self.report:
            self._report()
        elif self.list_presets or not (presets or tables):
            everything = not (presets or tables)
            print_list(
                tuple(PRESETS.values()) if everything else presets,
                tuple(known_tables().values()) if everything else tables,
                self.json_output,
            )
        elif self.dry_run:
            self._estimate(presets, tables)
        else:
            self._way(self.out)  # bad input is found before a folder is made
            parse_device(self.device)
            with reached(self.cluster):
                found = [self._reproduced(preset) for preset in presets]
            of_tables = [self._table(table) for table in tables]
            if not is_spoken_for():
                self._print(found, of_tables)
        return 0

    def _way(self, folder: Path) -> Way:
        require_counts(self, "workers", at_most=MAX_PROCESSES)
        require_seconds("--checkpoint-seconds", self.checkpoint_seconds)
        upkeep = Upkeep(folder=folder, checkpoint_seconds=self.checkpoint_seconds)
        return Way(out=folder, num_workers=self.workers, upkeep=upkeep, cluster=self.cluster)

    def _presets(self) -> tuple[Preset, ...]:
        """The named figures, each once; ``all`` selects every one."""
        named = [
            find_preset(name)
            for name in dict.fromkeys(self.names)
            if name != ALL and find_table(name) is None
        ]
        if ALL in self.names:
            if len(self.names) > 1:
                raise SpecError("all stands for every preset; give it alone")
            return tuple(PRESETS.values())
        return tuple(named)

    def _tables(self) -> tuple[Table, ...]:
        """The named tables, each once; ``all`` selects every one."""
        if ALL in self.names:
            return tuple(known_tables().values())
        named = (find_table(name) for name in self.names)
        return tuple({table.name: table for table in named if table is not None}.values())

    def _estimate(self, presets: Sequence[Preset], tables: Sequence[Table]) -> None:
        """Print the estimated time and memory of figures and tables."""
        device = str(parse_device(self.device))
        with redirect_stdout(sys.stderr):  # downloads print to the output
            found = {p.name: [estimate_preset(p, self.scale, device)] for p in presets}
            found |= {table.name: estimate_table(table, self.scale, device) for table in tables}
        print_table_estimates(found, self.scale, self.json_output)

    def _report(self) -> None:
        """Print the results in the folder."""
        results, of_tables = results_in(self.out), table_results_in(self.out)
        if not results and not of_tables:
            raise DataError(
                f"{self.out} has no results; normkit reproduce NAME --out {self.out} makes them"
            )
        if self.json_output:
            self._print(results, of_tables)
            return
        sections = [as_markdown(results)] if results else []
        sys.stdout.write("\n".join([*sections, *map(table_markdown, of_tables)]))

    def _table(self, table: Table) -> TableResult:
        """Run what is missing of a table, and write its result and figure."""
        name = f"reproduce-{table.name}"
        folder = usable_folder(self.out, f"{name}.json", f"{name}.{self.figure}")
        with redirect_stdout(sys.stderr):
            result = run_table(
                table,
                self.scale,
                folder=folder,
                way=self._way,
                show=sweep_progress,
                tell=_tell,
                device=str(parse_device(self.device)),
            )
        if is_spoken_for():  # the first process writes
            return result
        path = write_table(folder, result)
        picture = path.with_suffix(f".{self.figure}")
        draw_table(result, picture)
        sys.stderr.write(f"result: {path}\nfigure: {picture}\n")
        return result

    def _reproduced(self, preset: Preset) -> Result:
        names = (f"reproduce-{preset.name}{suffix}" for suffix in (".json", f".{self.figure}"))
        folder = usable_folder(self.out, RECORDS_NAME, *names)
        tell_of_corrupt_lines(read_records(folder, PresetRecord), folder / RECORDS_NAME)
        records = run_missing(
            preset,
            self.scale,
            folder,
            lambda specs: _Lines(preset.name, len(specs)),
            self._way(folder),
            str(parse_device(self.device)),
        )
        path = write_result(folder, conclude(preset, self.scale, records))
        picture = path.with_suffix(f".{self.figure}")
        preset.write_figure(measured(records), picture)
        sys.stderr.write(f"result: {path}\nfigure: {picture}\n")
        return read_result(path)

    def _print(self, results: Sequence[Result], of_tables: Sequence[TableResult]) -> None:
        if self.json_output:
            found = [result.model_dump(mode="json", exclude={"runs"}) for result in results]
            print_json(found + [result.model_dump(mode="json") for result in of_tables])
        else:
            texts = [*map(as_text, results), *map(table_text, of_tables)]
            sys.stdout.write("\n\n".join(texts) + "\n")


def _tell(note: str) -> None:
    sys.stderr.write(f"normkit: {note}\n")


@dataclass(slots=True)
class _Lines:
    """Writes a line for each run that ends, with the number of runs and the time that is left."""

    name: str
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def on_steps(self, spec: PresetSpec, num_steps: int) -> None:
        """Write nothing for single steps."""

    def on_record(self, record: PresetRecord) -> None:
        """Write a line."""
        self.done += 1
        rest = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        sys.stderr.write(
            f"{self.name}: {self.done} of {self.total} runs ({record.spec.arm}, seed "
            f"{record.spec.seed}: {record.message or f'{record.cpu_time_s:.1f} s'}), about "
            f"{rest:.0f} s left\n"
        )
