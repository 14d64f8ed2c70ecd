"""A sweep from what a user asks for to its result: find what is missing, run it, compare."""

from __future__ import annotations

import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from normkit.errors import PackageError, SpecError
from normkit.lab.check import check
from normkit.lab.comparison import Comparison, best_rates, compared, due_runs
from normkit.lab.config import CONFIG_NAME, asked, known_options, merged, write_config
from normkit.lab.data.folder import PREFIX
from normkit.lab.data.opening import forget_data
from normkit.lab.dry_run import DryRun, dry_run_of
from normkit.lab.files import usable_folder
from normkit.lab.launch import Launch, launched
from normkit.lab.lock import only_user
from normkit.lab.recipe import Recipe
from normkit.lab.records import (
    RECORDS_NAME,
    Change,
    Sources,
    TrainingRecord,
    append_record,
    changed_runs,
    latest,
    missing_runs,
    read_records,
    sources_of,
)
from normkit.lab.report import REPORT_NAME, RESULTS_NAME, write_report
from normkit.lab.resume import FOLDER
from normkit.lab.spec import SweepSpec, TrainingSpec
from normkit.lab.sweep import carry_out, prepare, reached
from normkit.lab.text import joined, table_lines
from normkit.lab.train import TRAINING, run
from normkit.lab.user_code import PREFIX as HELD_PREFIX
from normkit.lab.user_code import name_of
from normkit.lab.verdict import Verdict, verdict_of
from normkit.lab.work import RunOptions, Watcher, Way

if TYPE_CHECKING:
    import pandas as pd

OTHER: Mapping[Change, str] = {
    "data": "other data",
    "files": "other versions of your files",
    "normkit": "another version of normkit",
}
Told = Watcher[TrainingSpec, TrainingRecord]
Show = Callable[[Sequence[TrainingSpec], int], AbstractContextManager[Told]]


class Silent:
    """A watcher that tells nobody."""

    def on_steps(self, spec: TrainingSpec, num_steps: int) -> None:
        """Say nothing."""

    def on_record(self, record: TrainingRecord) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, the same on all processes of a launch.

    Args:
        sweep: All runs.
        missing: Those that have no record yet.
        sources: Data, model and code as they are now.
        num_examples: Training examples; 0 where a user's function trains.
        notes: What the user should know before anything runs, and who reads the result.
        changed: Runs that have records of other data, files or code, by key, with what is other.
    """

    sweep: SweepSpec
    missing: tuple[TrainingSpec, ...]
    sources: Sources
    num_examples: int
    notes: tuple[str, ...] = ()
    changed: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)


def plan(sweep: SweepSpec, out: Path) -> Plan:
    """Check everything, and find the runs that have no record.

    Raises:
        NormError: If something is wrong; nothing is written.
    """
    forget_data()  # files may have changed since it was last read
    data = check(sweep)
    sources = sources_of(sweep.protocol, None if data is None else data.fingerprint)
    contents = read_records(out, TrainingRecord)
    ours = [record for record in contents.records if sources.made(record)]
    due = due_runs(sweep, ours)
    changed = changed_runs(due, contents.records, sources)
    return Plan(
        sweep=sweep,
        missing=missing_runs(due, ours),
        sources=sources,
        num_examples=0 if data is None else data.num_examples,
        notes=(*(() if data is None else data.notes), *_notes_on(changed)),
        changed=changed,
    )


def _notes_on(changed: Mapping[str, tuple[Change, ...]]) -> list[str]:
    """A sentence for the runs of which the same has changed."""
    return [
        f"{number} of these runs {'has' if number == 1 else 'have'} earlier records of "
        f"{joined([OTHER[change] for change in changes])}, which are kept and left out; "
        f"{'it is' if number == 1 else 'they are'} run anew"
        for changes, number in Counter(changed.values()).items()
    ]


def perform(sweep: SweepSpec, way: Way, show: Show, tell: Callable[[str], None]) -> Result:
    """Do the runs of a sweep that have no record, and write the report.

    Args:
        sweep: What is compared.
        way: Where and how.
        show: Displays progress.
        tell: Gets what the user should know before anything runs.

    Returns:
        The result, on all processes of a launch.

    Raises:
        NormError: If something is wrong with what was asked for; nothing is half written.
    """
    with ExitStack() as held, launched() as launch:
        if way.cluster is not None and launch.size > 1:
            raise SpecError(
                f"{launch.size} processes were started to train each network together, and a "
                f"cluster gives each run to a machine of its own; leave out torchrun or --cluster"
            )
        if launch.size == 1:
            prepare(sweep.runs(), way)
        found = launch.first(lambda: _begin(sweep, way, held, tell))
        if found.missing:
            shown = show if launch.is_first else _silent
            _run(found, way, shown, launch)
            found = launch.first(lambda: _with_chosen_rates(found, way))
            if found.missing:
                _run(found, way, shown, launch)
            if launch.is_first:
                rmtree(way.out / FOLDER, ignore_errors=True)  # also drafts that a kill has left
        return launch.first(lambda: Result.of(found, way))


def _begin(sweep: SweepSpec, way: Way, held: ExitStack, tell: Callable[[str], None]) -> Plan:
    """Plan, take the folder, and write down what was asked for."""
    found = plan(sweep, way.out)
    if found.missing:
        held.enter_context(reached(way.cluster))
    usable_folder(way.out, RECORDS_NAME, RESULTS_NAME, REPORT_NAME)
    held.enter_context(only_user(way.out))
    ours = _records(found, way)  # of who held the folder until now, too
    found = replace(found, missing=missing_runs(found.missing, ours))
    for note in found.notes:
        tell(note)
    write_config(way.out / CONFIG_NAME, sweep, way.options)
    return found


def _with_chosen_rates(found: Plan, way: Way) -> Plan:
    """What is left once learning rates are chosen; what was tried already is not repeated."""
    ours = _records(found, way)
    tried = {spec.key for spec in found.missing}
    left = missing_runs(due_runs(found.sweep, ours), ours)
    return replace(found, missing=tuple(spec for spec in left if spec.key not in tried))


def _records(found: Plan, way: Way) -> list[TrainingRecord]:
    """The records of the folder by now that are of the plan's code, data and model."""
    known = read_records(way.out, TrainingRecord).records
    return [record for record in known if found.sources.made(record)]


def _run(found: Plan, way: Way, show: Show, launch: Launch) -> None:
    with show(found.missing, found.num_examples) as watcher:
        if launch.size > 1:
            _run_together(found.missing, way, watcher, launch)
        else:
            carry_out(found.missing, way, TRAINING, watcher)


def _run_together(specs: Sequence[TrainingSpec], way: Way, watcher: Told, launch: Launch) -> None:
    """Train each network on all processes at once; the first one keeps the records."""
    for spec in specs:
        record = run(spec, lambda spec=spec: watcher.on_steps(spec, 1), way.upkeep)
        if launch.is_first:
            append_record(way.out, record)
            watcher.on_record(record)


def _silent(specs: Sequence[TrainingSpec], num_examples: int) -> AbstractContextManager[Told]:
    return nullcontext(Silent())


@dataclass(frozen=True, slots=True)
class Result:
    """What a comparison came to; printed, it is the tables.

    Args:
        comparison: A cell for each norm and batch size.
        records: One for each run that there is, by the best learning rates.
        folder: Where the records and the report are.
    """

    comparison: Comparison
    records: tuple[TrainingRecord, ...]
    folder: Path

    @classmethod
    def of(cls, found: Plan, way: Way) -> Result:
        """Read the records of what was planned, and write the report."""
        records = best_rates(found.sweep, latest(found.sweep.runs(), _records(found, way)))
        comparison = compared(found.sweep, records, found.notes)
        write_report(way.out, comparison, records, way.command, found.changed)
        return cls(comparison, records, way.out)

    @property
    def verdict(self) -> Verdict:
        """Which norms are ahead of the first one and where, with 95 % intervals."""
        return verdict_of(self.comparison)

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.comparison.notes]
        return "\n".join([*self.verdict.lines, "", *table_lines(self.comparison), *notes])

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each norm and batch size: means and spreads over seeds, time and memory."""
        return [cell.row() for cell in self.comparison.cells]

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas frame.

        Raises:
            PackageError: If pandas is not installed.
        """
        try:
            import pandas as pd  # not needed otherwise
        except ModuleNotFoundError as error:
            raise PackageError("frame() needs pandas: pip install pandas; or use rows()") from error
        return pd.DataFrame(self.rows())

    def report(self) -> Path:
        """The page with charts, beside the records."""
        return self.folder / REPORT_NAME


@overload
def compare(
    model: str | Callable[..., nn.Module] | None = None,
    data: Any = None,
    *,
    dry_run: Literal[True],
    **options: Any,
) -> DryRun: ...


@overload
def compare(
    model: str | Callable[..., nn.Module] | None = None,
    data: Any = None,
    *,
    dry_run: Literal[False] = False,
    **options: Any,
) -> Result: ...


def compare(
    model: str | Callable[..., nn.Module] | None = None,
    data: Any = None,
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    dry_run: bool = False,
    show: Show | None = None,
    **options: Any,
) -> Result | DryRun:
    """Train one network with several norms at several batch sizes, and say which is best.

    Runs that have a record in ``out`` are not repeated, unless the data, the model's source or
    normkit itself has changed.

    Args:
        model: A name such as ``"timm:resnet18"``, ``"my.py:make_model"``, or a function that makes
            a network; by default ``"small-resnet"``. Its norms are replaced.
        data: A name such as ``"digits"``, a folder with a folder for each class such as
            ``"./photos"``, ``"my.py:make_datasets"``, or data sets: ``{"train": ..., "test": ...}``
            or a tuple; a ``Path`` is a folder. By default ``"digits"``.
        recipe: How to train, whole; or some of its fields by name.
        config: A TOML file of options, such as the ``experiment.toml`` of another comparison;
            what else is given here wins over it.
        dry_run: Whether nothing is trained, and the result says what it would take.
        show: Displays progress; by default nothing does.
        options: Every other option of ``normkit compare`` by its name, with ``_`` for ``-``, as
            ``docs/compare.md`` lists them. What is compared: ``norms`` (norms or arms, also those
            of ``nk.register_norm``; differences are taken to the first), ``batch_sizes`` and
            ``seeds``, each one or several. ``tune_lr`` has learning rates, of which each norm at
            each batch size gets the best; the first ``tune_seeds`` seeds choose. ``train`` is a
            function of one's own that trains instead, called as ``train(apply_norm, batch_size,
            seed, report)``. How it is done: ``out`` (the folder), ``device``, ``workers``,
            ``data_workers``, ``threads``, ``cluster``, ``checkpoint_seconds``, ``save_weights``,
            ``loggers``, ``probe_every``.

    Warns:
        UserWarning: If pictures are left out, or records of other data, models or code.

    Returns:
        The result: print it, or take ``.rows()``, ``.frame()``, ``.verdict`` and ``.report()``; of
        a dry run the table of what it would take, with ``.rows()``.

    Raises:
        NormError: If something is wrong with what was given; nothing is then written.

    Example:
        >>> import tempfile
        >>> from normkit.lab import Recipe, compare
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = compare(
        ...         "mlp:depth=2:width=8", norms=["bn", "ln"], batch_sizes=[8], seeds=[1],
        ...         recipe=Recipe(epochs=1), limit=40, out=out,
        ...     )
        >>> [row["norm"] for row in result.rows()]
        ['bn', 'ln']
    """
    named = {"model": model, "data": data, "train": options.pop("train", None)}
    given = {name: _as_text(name, value) for name, value in named.items() if value is not None}
    values = known_options(_recipe(recipe) | options | given, "compare()")
    sweep, run_options = asked(merged(config, values), str)
    way = run_options.way(_command(run_options, sweep))
    if dry_run:
        return dry_run_of(sweep, way.out)
    return perform(sweep, way, show or _silent, lambda note: warnings.warn(note, stacklevel=2))


def _recipe(given: Recipe | Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields that are given: all of a recipe, or those that are named."""
    if isinstance(given, Recipe):
        return given.model_dump()
    Recipe.checked(given or {})
    return dict(given or {})


def _as_text(name: str, given: Any) -> str:
    """What stands for a model, data or a function in specs and files."""
    if isinstance(given, Path):
        return f"{PREFIX}{given}" if name == "data" else str(given)
    return given if isinstance(given, str) else name_of(given, name)


def _command(options: RunOptions, sweep: SweepSpec) -> str:
    """What makes the report again; nothing if only this process knows the functions."""
    if any(name.startswith(HELD_PREFIX) for name in sweep.runs()[0].own_names):
        return ""
    return shlex.join(["normkit", "compare", "--config", str(Path(options.out) / CONFIG_NAME)])
