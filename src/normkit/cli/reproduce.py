"""`normkit reproduce`: figures of the papers at small scale, and whether their claims held."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from normkit.cli.shared import (
    print_json,
    require_counts,
    require_seconds,
    tell_of_corrupt_lines,
)
from normkit.errors import SpecError
from normkit.lab.device import parse_device
from normkit.lab.files import usable_folder
from normkit.lab.records import RECORDS_NAME, read_records
from normkit.lab.reproduce import (
    PRESETS,
    SCALES,
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
from normkit.lab.reproduce.tasks.records import PresetRecord, PresetSpec
from normkit.lab.resume import SECONDS
from normkit.lab.sweep import reached
from normkit.lab.work import MAX_PROCESSES, Upkeep, Way

ALL = "all"
NAMES = tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="(default: list the presets)")
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Repeat figures of the papers at small scale, and judge their claims by what comes out.

    A claim held if the 95 % interval of its number over the seeds fulfils it, did not hold if the
    interval breaks it, and is not decided otherwise. Runs that have a record are not repeated.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, NAMES] = ()
    """Presets, or all."""
    scale: Scale = "small"
    """small takes minutes for each preset on one core, tiny seconds, paper the paper's settings."""
    out: Path = Path("runs/reproduce")
    """Folder for records.jsonl, and for each preset reproduce-NAME.json and its figure."""
    figure: Literal["svg", "png", "pdf"] = "svg"
    """What the figure is written as."""
    device: str = "cpu"
    """Where each run computes: auto, cpu or cuda."""
    workers: int | None = None
    """Runs at once; as many as the machine has room for if not given."""
    cluster: Literal["ray"] | None = None
    """Do the runs on a Ray cluster: that of RAY_ADDRESS, or one that is started here."""
    checkpoint_seconds: float = SECONDS
    """Time between two checkpoints of a run, from which it goes on after it was killed."""
    list_presets: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False
    """List the presets and the claims of each, and run nothing."""
    report: Flag = False
    """Print the tables of all results in the folder as Markdown, and run nothing."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Run what is missing, judge, write, print.

        Returns:
            0; a claim that did not hold is a result, not a failure.

        Raises:
            NormError: If a preset or scale is unknown, or the folder cannot be used.
        """
        presets = self._presets()
        if self.report:
            results = results_in(self.out)
            if self.json_output:
                self._print(results)
            else:
                sys.stdout.write(as_markdown(results))
        elif self.list_presets or not presets:
            self._print_list(presets or tuple(PRESETS.values()))
        else:
            self._way(self.out)  # bad input is found before a folder is made
            parse_device(self.device)
            with reached(self.cluster):
                self._print([self._reproduced(preset) for preset in presets])
        return 0

    def _way(self, folder: Path) -> Way:
        require_counts(self, "workers", at_most=MAX_PROCESSES)
        require_seconds("--checkpoint-seconds", self.checkpoint_seconds)
        upkeep = Upkeep(folder=folder, checkpoint_seconds=self.checkpoint_seconds)
        return Way(out=folder, num_workers=self.workers, upkeep=upkeep, cluster=self.cluster)

    def _presets(self) -> tuple[Preset, ...]:
        """The presets that were named, each once; with ``all`` those that have the scale."""
        named = [find_preset(name) for name in dict.fromkeys(self.names) if name != ALL]
        if ALL in self.names:
            if named:
                raise SpecError("all stands for every preset; give it alone")
            left = [p.name for p in PRESETS.values() if self.scale not in p.scales]
            if left:
                sys.stderr.write(f"left out, without a scale {self.scale}: {', '.join(left)}\n")
            return tuple(p for p in PRESETS.values() if self.scale in p.scales)
        for preset in named:
            preset.at(self.scale)
        return tuple(named)

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

    def _print(self, results: Sequence[Result]) -> None:
        if self.json_output:
            found = [result.model_dump(mode="json", exclude={"runs"}) for result in results]
            print_json(found)
        else:
            sys.stdout.write("\n\n".join(map(as_text, results)) + "\n")

    def _print_list(self, presets: Iterable[Preset]) -> None:
        if self.json_output:
            print_json([_described(preset) for preset in presets])
            return
        for preset in presets:
            sys.stdout.write(f"{preset.name}: {preset.title}\n")
            scales = ", ".join(scale for scale in SCALES if scale in preset.scales)
            sys.stdout.write(f"  {preset.paper.authors}, {preset.figures}; scales {scales}\n")
            for claim in preset.claims:
                sys.stdout.write(f"  - {claim.text} ({claim.source})\n")


@dataclass(slots=True)
class _Lines:
    """Says of each run that ends how many are done and about how long the rest takes."""

    name: str
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def on_steps(self, spec: PresetSpec, num_steps: int) -> None:
        """Say nothing of single steps."""

    def on_record(self, record: PresetRecord) -> None:
        """Write a line."""
        self.done += 1
        rest = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        sys.stderr.write(
            f"{self.name}: {self.done} of {self.total} runs ({record.spec.arm}, seed "
            f"{record.spec.seed}: {record.message or f'{record.cpu_time_s:.1f} s'}), about "
            f"{rest:.0f} s left\n"
        )


def _described(preset: Preset) -> dict[str, object]:
    return {
        "name": preset.name,
        "title": preset.title,
        "paper": f"{preset.paper.authors}, {preset.paper.title}",
        "figures": preset.figures,
        "scales": list(preset.scales),
        "claims": [
            {"claim": claim.text, "source": claim.source, "quantity": claim.quantity}
            for claim in preset.claims
        ],
    }
