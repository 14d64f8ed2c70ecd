"""`normkit bench`: times our layers and torch's in one run."""

import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from normkit.cli.bench_tables import print_bench, print_end_to_end, print_fused
from normkit.cli.options import Json
from normkit.cli.shared import flag, print_json, require_counts, whole_numbers
from normkit.cli.streams import Terminal
from normkit.errors import SpecError
from normkit.lab.bench import (
    BenchRecord,
    BenchSpec,
    Job,
    cells_of,
    jobs_of,
    read_record,
    read_shapes,
    run_bench,
    targets_of,
    write_record,
)
from normkit.lab.bench.chart import write_chart
from normkit.lab.bench.end_to_end import Setting, run_end_to_end, workloads_for
from normkit.lab.bench.fused import WORKLOADS as FUSED_WORKLOADS
from normkit.lab.bench.fused import run_fused
from normkit.lab.bench.markdown import markdown
from normkit.lab.device import parse_device
from normkit.lab.files import usable_folder
from normkit.lab.work import MAX_PROCESSES
from normkit.spec import parse_specs


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time our layers and torch's in turns, and compare them.

    Times are compared only if outputs and input gradients agree.
    """

    norms: str = "bn,gn:32,in,ln"
    """Norms, separated by commas."""
    shapes: str = "resnet50"
    """Shapes of the maps: resnet50, small, or a file with a JSON list of [C, H, W]."""
    batch_sizes: str = "2,32"
    """Batch sizes, separated by commas."""
    dtype: str = "float32"
    """The maps' dtype: float32, float64, bfloat16 or float16."""
    memory_format: str = "contiguous"
    """The maps' layout: contiguous or channels_last."""
    against: str = "torch,composition"
    """Peers: torch's layers; compositions of torch's operators, for norms without a layer in torch;
    compile."""
    device: str = "cpu"
    """Where to compute: auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads; torch's own number if not given."""
    repeats: int = 200
    """Largest number of times that a call is timed."""
    budget_s: float = 0.5
    """Seconds after which a call is no longer repeated; it is timed at least five times."""
    end_to_end: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Time training steps of whole networks instead of layers."""
    fused: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Time batch norm and ReLU in one pass and separately, in layers and in whole networks."""
    out: Path | None = None
    """File for the record (JSON); a chart is written beside it."""
    render: Path | None = None
    """Measure nothing: print the tables of this record as Markdown and draw its chart again."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also print the times of every shape."""
    json_output: Json = False
    """Print the result as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Measure, print the tables, write the record and its chart.

        Returns:
            0.
        """
        if self.render is not None:
            return self._render(self.render)
        if self.out is not None:
            if self.out.suffix != ".json":
                raise SpecError(f"--out was given {str(self.out)!r}; its name ends in .json")
            usable_folder(self.out.parent, self.out.name, self.out.with_suffix(".svg").name)
        if self.fused:
            return self._run_fused()
        return self._run_end_to_end() if self.end_to_end else self._run_layers()

    def spec(self) -> BenchSpec:
        """The benchmark that the options describe.

        Raises:
            SpecError: If an option breaks its rule.
        """
        return BenchSpec.checked(
            {
                "norms": tuple(str(spec) for spec in parse_specs(self.norms)),
                "shapes": self.shapes,
                "maps": read_shapes(self.shapes),
                "batch_sizes": whole_numbers("--batch-sizes", self.batch_sizes),
                "dtype": self.dtype,
                "memory_format": self.memory_format,
                "against": tuple(part.strip() for part in self.against.split(",")),
                "device": str(parse_device(self.device)),
                "threads": self._threads(),
                "repeats": self.repeats,
                "budget_s": self.budget_s,
            },
            flag,
        )

    def _threads(self) -> int:
        if self.threads is None:
            return torch.get_num_threads()
        require_counts(self, "threads", at_most=MAX_PROCESSES)
        return self.threads

    def _run_layers(self) -> int:
        with redirect_stdout(sys.stderr):
            spec = self.spec()
            jobs = jobs_of(spec)
            with _progress(sum(job.cost for job in jobs)) as display:
                record = run_bench(spec, lambda job: _advance(display, job))
        self._write(record)
        if self.json_output:
            print_json(_as_json(record))
        else:
            print_bench(record, self.verbose)
        return 0

    def _run_end_to_end(self) -> int:
        device = parse_device(self.device)
        setting = Setting(device=str(device), threads=self._threads(), repeats=self.repeats)
        workloads = workloads_for(device)
        with redirect_stdout(sys.stderr), _progress(len(workloads)) as display:
            record = run_end_to_end(
                setting, workloads, lambda _: display.advance(display.task_ids[0])
            )
        if self.out is not None:
            write_record(self.out, record)
        if self.json_output:
            print_json(record.model_dump(mode="json"))
        else:
            print_end_to_end(record)
        return 0

    def _run_fused(self) -> int:
        setting = Setting(device=self.device, threads=self._threads(), repeats=self.repeats)
        shapes, sizes = read_shapes(self.shapes), whole_numbers("--batch-sizes", self.batch_sizes)
        total = len(shapes) * len(sizes) + len(FUSED_WORKLOADS)
        with redirect_stdout(sys.stderr), _progress(total) as display:
            record = run_fused(
                setting,
                shapes=shapes,
                batch_sizes=sizes,
                on_row=lambda _: display.advance(display.task_ids[0]),
            )
        if self.out is not None:
            write_record(self.out, record)
        if self.json_output:
            print_json(record.model_dump(mode="json"))
        else:
            print_fused(record)
        return 0

    def _render(self, path: Path) -> int:
        record = read_record(path)
        write_chart(path.with_suffix(".svg"), record)
        if self.json_output:
            print_json(_as_json(record))
        else:
            sys.stdout.write(markdown(record))
        return 0

    def _write(self, record: BenchRecord) -> None:
        if self.out is None:
            return
        chart = self.out.with_suffix(".svg")
        write_record(self.out, record)
        write_chart(chart, record)
        sys.stderr.write(f"record: {self.out}\nchart: {chart}\n")


def _as_json(record: BenchRecord) -> dict[str, object]:
    result = record.model_dump(mode="json")
    result["cells"] = [cell.model_dump(mode="json") for cell in cells_of(record)]
    result["targets"] = [target.model_dump(mode="json") for target in targets_of(record)]
    return result


@contextmanager
def _progress(total: float) -> Generator[Progress]:
    """Show the progress of the measurements, and the time that is left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("remaining"),
    )
    # Redrawing disturbs the measurement, so it happens only once per second.
    with Progress(*columns, console=Terminal(stderr=True), refresh_per_second=1) as display:
        display.add_task("measuring", total=total)
        yield display


def _advance(display: Progress, job: Job) -> None:
    display.update(display.task_ids[0], advance=job.cost, description=str(job))
