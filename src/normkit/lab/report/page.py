"""The report of a sweep: one self-contained HTML file, and its runs as CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, PackageLoader, StrictUndefined

from normkit.lab.comparison import Comparison, select
from normkit.lab.evaluation import is_share
from normkit.lab.files import write_whole
from normkit.lab.records import TrainingRecord
from normkit.lab.report import comparison_charts as charts
from normkit.lab.report.charts import Chart
from normkit.lab.report.results import RESULTS_NAME, csv_text
from normkit.lab.task import parse_task
from normkit.lab.text import MISSING, percent, points, size_text
from normkit.lab.verdict import verdict_of

REPORT_NAME = "report.html"
ESCAPED = ("html", "svg", "j2")


@dataclass(frozen=True, slots=True, kw_only=True)
class SizePanel:
    """Learning curves at one batch size."""

    batch_size: int
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """The norms that `auto` or `max=` was resolved to: a row per layer, a column per batch size."""

    norm: str
    layers: tuple[tuple[str, tuple[str, ...]], ...]


def write_report(
    folder: Path,
    comparison: Comparison,
    records: Sequence[TrainingRecord],
    command: str,
    changed: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Path:
    """Write the report of a sweep, and beside it ``results.csv`` with a row for each run.

    Args:
        folder: Folder of the files; older files are replaced atomically.
        comparison: The table.
        records: The sweep's records, one per run.
        command: Command line that makes this report again.
        changed: What has changed since earlier records of a run, by its key.

    Returns:
        Path of the report.

    Raises:
        DataError: If one of the files cannot be written.
    """
    write_whole(folder / RESULTS_NAME, csv_text(records, changed))
    return write_whole(folder / REPORT_NAME, render(comparison, records, command))


def render(comparison: Comparison, records: Sequence[TrainingRecord], command: str) -> str:
    """Return the report as HTML text."""
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            comparison=comparison,
            verdict=verdict_of(comparison),
            results_name=RESULTS_NAME,
            records=records,
            command=command,
            protocol=records[0].spec.protocol if records else None,
            task=parse_task(records[0].spec.protocol.task) if records else None,
            environments=_distinct_environments(records),
            kernels=sorted({r.environment.kernels or "not recorded" for r in records}),
            code_hashes=sorted({record.code_hash for record in records}),
            accuracy_charts={
                "wide": charts.accuracy_chart(comparison, records, charts.WIDE),
                "narrow": charts.accuracy_chart(comparison, records, charts.NARROW),
            },
            panels=[
                _panel(comparison, records, size)
                for size in comparison.batch_sizes
                if any(record.outcome.epochs for record in records)
            ],
            best={size: best_norms(comparison, size) for size in comparison.batch_sizes},
            resolutions=_resolutions(comparison, records),
            num_parameters=sorted({r.outcome.num_parameters or 0 for r in records} - {0}),
        )
    )


def best_norms(comparison: Comparison, batch_size: int) -> list[str]:
    """The norms with the best mean score at a batch size; several if they tie."""
    cells = [comparison.cell(norm, batch_size) for norm in comparison.norms]
    means = {cell.norm: cell.accuracy.mean for cell in cells if cell.accuracy is not None}
    best = max if comparison.higher_is_better else min
    return [norm for norm, mean in means.items() if mean == best(means.values())]


def templates() -> Environment:
    """The page templates, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("normkit.lab", "report"),
        autoescape=lambda name: name is not None and name.endswith(ESCAPED),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["is_share"] = is_share
    environment.filters["points"] = points
    environment.filters["size"] = size_text
    return environment


def _panel(comparison: Comparison, records: Sequence[TrainingRecord], batch_size: int) -> SizePanel:
    return SizePanel(
        batch_size=batch_size,
        charts=(
            charts.loss_chart(comparison, records, batch_size),
            charts.validation_chart(comparison, records, batch_size),
        ),
    )


def _distinct_environments(records: Sequence[TrainingRecord]) -> list[dict[str, object]]:
    distinct: list[dict[str, object]] = []
    for record in records:
        values = record.environment.model_dump(exclude={"date"})
        if values not in distinct:
            distinct.append(values)
    return distinct


def _resolutions(comparison: Comparison, records: Sequence[TrainingRecord]) -> list[Resolution]:
    found = [_resolution(comparison, records, norm) for norm in comparison.norms]
    return [item for item in found if item is not None]


def _resolution(
    comparison: Comparison, records: Sequence[TrainingRecord], norm: str
) -> Resolution | None:
    """The resolved norm of each layer; None if all layers have the norm as it was written."""
    columns = []
    for size in comparison.batch_sizes:
        placed = next((r.outcome.norms for r in select(records, norm, size) if r.outcome.norms), ())
        columns.append({place.name: place.norm for place in placed})
    names = list(dict.fromkeys(name for column in columns for name in column))
    layers = tuple((name, tuple(column.get(name, MISSING) for column in columns)) for name in names)
    changed = any(cell not in (norm, MISSING) for _, cells in layers for cell in cells)
    return Resolution(norm=norm, layers=layers) if changed else None
