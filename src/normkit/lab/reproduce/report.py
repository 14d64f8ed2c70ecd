"""What a preset came to: verdicts and runs in one file, and as text."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from normkit.lab.files import file_errors, write_whole
from normkit.lab.frozen import Frozen
from normkit.lab.lines import read_whole
from normkit.lab.reproduce.catalog import PRESETS, find_preset
from normkit.lab.reproduce.preset import Preset, Scale
from normkit.lab.reproduce.run import measured
from normkit.lab.reproduce.tasks.records import PresetRecord
from normkit.lab.reproduce.verdict import OUTCOMES, Criterion, Verdict
from normkit.lab.text import joined


class Judged(Frozen):
    """A claim and its verdict."""

    source: str
    claim: str
    quantity: str
    criterion: Criterion
    verdict: Verdict

    @property
    def lines(self) -> list[str]:
        """For a terminal."""
        return [
            f"{self.verdict.outcome.upper()}: {self.claim} ({self.source})",
            f"  {self.quantity}: {self.verdict}; claimed: {self.criterion}",
        ]


def claims_markdown(claims: Sequence[Judged], mark: str = "") -> list[str]:
    """Claims and verdicts as a table.

    Args:
        claims: One a row.
        mark: What stands around quantities.
    """
    rows = [
        f"| {one.claim} ({one.source}) | {mark}{one.quantity}{mark} | {one.verdict} | "
        f"{one.criterion} | **{one.verdict.outcome}** |"
        for one in claims
    ]
    return [
        "| the paper says | measured | mean [95 % interval] | claimed | verdict |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


class Result(Frozen):
    """A preset that was run.

    Args:
        preset: Its name.
        paper: Authors and title.
        figures: Of the paper.
        scale: How large it was run.
        differences: From the paper's settings.
        claims: With their verdicts, which are computed from ``runs``.
        runs: All of them.
    """

    preset: str
    paper: str
    figures: str
    scale: Scale
    differences: tuple[str, ...]
    claims: tuple[Judged, ...]
    runs: tuple[PresetRecord, ...]


def conclude(preset: Preset, scale: Scale, records: Iterable[PresetRecord]) -> Result:
    """Judge every claim of a preset by its records."""
    records = tuple(records)
    runs = measured(records)
    return Result(
        preset=preset.name,
        paper=f"{preset.paper.authors}, {preset.paper.title}",
        figures=preset.figures,
        scale=scale,
        differences=preset.differences(scale),
        claims=tuple(
            Judged(
                source=claim.source,
                claim=claim.text,
                quantity=claim.quantity,
                criterion=claim.criterion,
                verdict=claim.judged(runs),
            )
            for claim in preset.claims
        ),
        runs=records,
    )


def result_path(folder: Path, name: str) -> Path:
    """Where a preset's result is in a folder."""
    return folder / f"reproduce-{name}.json"


def write_result(folder: Path, result: Result) -> Path:
    """Write a result in one piece, a run a line.

    Raises:
        DataError: If it cannot be written.
    """
    path = result_path(folder, result.preset)
    about = json.dumps(result.model_dump(mode="json", exclude={"runs"}), indent=1)
    lines = ",\n".join(
        f"  {record.model_dump_json(exclude_defaults=True)}" for record in result.runs
    )
    text = f'{about.removesuffix("}").rstrip()},\n "runs": [\n{lines}\n ]\n}}\n'
    return write_whole(path, text)


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        DataError: If the file holds none.
    """
    way_out = "run normkit reproduce again, which repeats no run that has a record"
    return read_whole(path, Result, "result of a preset", way_out)


def results_in(folder: Path) -> list[Result]:
    """Results of all figures that a folder has, in the order of the presets.

    Raises:
        DataError: If one cannot be read.
    """
    paths = [result_path(folder, name) for name in PRESETS]
    with file_errors(folder):
        return [read_result(path) for path in paths if path.exists()]


def as_text(result: Result) -> str:
    """A result for a terminal."""
    lines = [
        f"{result.preset}: {result.paper}, {result.figures} (scale {result.scale})",
        *(f"  {difference}" for difference in result.differences),
    ]
    for judged in result.claims:
        lines += judged.lines
    return "\n".join(lines)


def as_markdown(results: Sequence[Result], images: str = "") -> str:
    """Tables of claims and verdicts, a section for each preset.

    Args:
        results: In this order.
        images: What stands before the names of the figures' files.
    """
    sections = (_section(result, images) for result in results)
    return "\n".join([*_summary(results), *sections])


def _summary(results: Sequence[Result]) -> list[str]:
    """How many claims held, altogether and by preset."""
    rows = [
        f"| [`{result.preset}`](#{result.preset}) | {_cited(result)} | {_counts([result], ' | ')} |"
        for result in results
    ]
    runs = {record.spec.key: record for result in results for record in result.runs}
    versions = sorted({record.code_hash for record in runs.values()})
    number = sum(len(result.claims) for result in results)
    cost = f"{_minutes(runs.values()):.0f} minutes of one core; code {', '.join(versions)}"
    return [
        f"{number} claims: {_counts(results, ', ', named=True)}. {cost}.\n",
        f"| preset | figure | {' | '.join(OUTCOMES)} |",
        "|---|---|---:|---:|---:|",
        *rows,
        "",
    ]


def _counts(results: Iterable[Result], between: str, *, named: bool = False) -> str:
    found = [judged.verdict.outcome for result in results for judged in result.claims]
    counts = ((found.count(outcome), outcome) for outcome in OUTCOMES)
    return between.join(f"{count} {outcome}" if named else str(count) for count, outcome in counts)


def _cited(result: Result) -> str:
    return f"{find_preset(result.preset).paper.authors}, {result.figures}"


def _minutes(runs: Iterable[PresetRecord]) -> float:
    return sum(record.cpu_time_s for record in runs) / 60


def _circumstances(result: Result) -> str:
    return (
        f"{find_preset(result.preset).title}: {_cited(result)}. {len(result.runs)} runs, "
        f"{_minutes(result.runs):.1f} minutes of one core.\n"
    )


def differences_markdown(differences: Sequence[str], silent: Sequence[str] = ()) -> list[str]:
    """What is otherwise than in the paper, as a list that a reader opens.

    Args:
        differences: Of the settings.
        silent: Settings that the paper does not state.
    """
    number = len(differences)
    settings = f"{number or 'no'} {'setting' if number == 1 else 'settings'}"
    return [
        '<details markdown="1">',
        f"<summary>Otherwise than in the paper: {settings}</summary>\n",
        *(f"- {difference}" for difference in differences),
        *([f"\nThe paper does not state {joined(silent)}."] if silent else []),
        "\n</details>\n",
    ]


def _section(result: Result, images: str) -> str:
    title = find_preset(result.preset).title
    return "\n".join(
        [
            f"### {result.preset}\n",
            _circumstances(result),
            *differences_markdown(result.differences),
            f"![{title}]({images}reproduce-{result.preset}.svg)\n",
            *claims_markdown(result.claims),
        ]
    )
