"""A sweep from what a user asks for to its result: find what is missing, run it, compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from torch import nn

from normkit.errors import PackageError, SpecError
from normkit.lab.arms import Arm, parse_arms
from normkit.lab.check import check
from normkit.lab.comparison import Comparison, best_rates, compared
from normkit.lab.config import CONFIG_NAME, write_config
from normkit.lab.data.folder import PREFIX
from normkit.lab.data.opening import forget_data
from normkit.lab.device import parse_device
from normkit.lab.files import usable_folder
from normkit.lab.launch import Launch, launched, num_launched
from normkit.lab.lock import only_user
from normkit.lab.own_norms import norms_in_use
from normkit.lab.recipe import Recipe
from normkit.lab.records import (
    RECORDS_NAME,
    Sources,
    TrainingRecord,
    append_record,
    latest,
    missing_runs,
    read_records,
    sources_of,
)
from normkit.lab.report import REPORT_NAME, RESULTS_NAME, write_report
from normkit.lab.resume import FOLDER
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.sweep import carry_out, prepare, reached
from normkit.lab.text import table_lines
from normkit.lab.train import TRAINING, run
from normkit.lab.user_code import name_of
from normkit.lab.verdict import Verdict, verdict_of
from normkit.lab.work import Upkeep, Watcher, Way

if TYPE_CHECKING:
    import pandas as pd

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
        notes: What the user should know before anything runs.
    """

    sweep: SweepSpec
    missing: tuple[TrainingSpec, ...]
    sources: Sources
    num_examples: int
    notes: tuple[str, ...] = ()


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
    keys = {spec.key for spec in sweep.runs()}
    stale = {r.spec.key for r in contents.records if r.spec.key in keys and not sources.made(r)}
    notes = list(() if data is None else data.notes)
    if stale:
        notes.append(
            f"{len(stale)} of these runs have records of other data, another model's source or "
            f"another version of normkit; those are kept and left out, and the runs done again"
        )
    return Plan(
        sweep=sweep,
        missing=missing_runs(sweep.runs(), ours),
        sources=sources,
        num_examples=0 if data is None else data.num_examples,
        notes=tuple(notes),
    )


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
            _run(found, way, show if launch.is_first else _silent, launch)
            if launch.is_first:
                rmtree(way.out / FOLDER, ignore_errors=True)  # also drafts that a kill has left
        return launch.first(lambda: Result.of(found.sweep, found.sources, way))


def _begin(sweep: SweepSpec, way: Way, held: ExitStack, tell: Callable[[str], None]) -> Plan:
    """Plan, take the folder, and write down what was asked for."""
    found = plan(sweep, way.out)
    if found.missing:
        held.enter_context(reached(way.cluster))
    usable_folder(way.out, RECORDS_NAME, RESULTS_NAME, REPORT_NAME)
    held.enter_context(only_user(way.out))
    known = read_records(way.out, TrainingRecord).records  # of who held the folder until now, too
    ours = [record for record in known if found.sources.made(record)]
    found = replace(found, missing=missing_runs(found.missing, ours))
    for note in found.notes:
        tell(note)
    write_config(way.out / CONFIG_NAME, sweep, way.options)
    return found


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
    def of(cls, sweep: SweepSpec, sources: Sources, way: Way) -> Result:
        """Read the records of a sweep and write its report."""
        known = read_records(way.out, TrainingRecord).records
        every = latest(sweep.runs(), (record for record in known if sources.made(record)))
        records = best_rates(sweep, every)
        comparison = compared(sweep, records)
        write_report(way.out, comparison, records, way.command)
        return cls(comparison, records, way.out)

    @property
    def verdict(self) -> Verdict:
        """Which norms are ahead of the first one and where, with 95 % intervals."""
        return verdict_of(self.comparison)

    def __str__(self) -> str:
        return "\n".join([*self.verdict.lines, "", *table_lines(self.comparison)])

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


def compare(  # noqa: PLR0913 - all but two by keyword
    model: str | Callable[..., nn.Module] = "small-resnet",
    data: Any = "digits",
    *,
    norms: str | Iterable[str] = ("bn", "gn:8", "bgn:auto"),
    batch_sizes: int | Iterable[int] = (2, 8, 32),
    seeds: int | Iterable[int] = (1, 2, 3),
    recipe: Recipe | Mapping[str, Any] | None = None,
    train: str | Callable[..., Any] | None = None,
    out: str | Path = "runs/compare",
    device: str = "auto",
    threads: int = 1,
    workers: int | None = None,
    tune_lr: float | Iterable[float] = (),
    save_weights: bool = False,
    show: Show | None = None,
    **protocol: Any,
) -> Result:
    """Train one network with several norms at several batch sizes, and say which is best.

    Runs that have a record in ``out`` are not repeated, unless the data, the model's source or
    normkit itself has changed.

    Args:
        model: A name such as ``"timm:resnet18"``, ``"my.py:make_model"``, or a function that makes
            a network. Its norms are replaced.
        data: A name such as ``"digits"``, ``"folder:photos"``, ``"my.py:make_datasets"``, or data
            sets: ``{"train": ..., "test": ...}`` or a tuple; a ``Path`` is a folder.
        norms: Norms or arms; differences are taken to the first. Norms of your own have their names
            from ``nk.register_norm``.
        batch_sizes: Examples that a norm sees at a time, on each process.
        seeds: Of weights and data order; each cell runs all of them.
        recipe: How to train; by default ``Recipe()``.
        train: A function of one's own that trains instead, called as
            ``train(apply_norm, batch_size, seed, report)``; it returns a number, or several by
            name. ``model``, ``data`` and ``recipe`` have no part then.
        out: Folder of the records, the report and checkpoints.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        threads: CPU threads of one run.
        workers: Runs at once; by default as many as the machine has room for.
        tune_lr: Learning rates, of which each norm at each batch size gets the one that is best on
            validation data.
        save_weights: Whether the trained weights are written to ``out/weights``.
        show: Displays progress; by default nothing does.
        protocol: Further fields of ``normkit.lab.spec.Protocol``, such as ``limit=1000``.

    Warns:
        UserWarning: If pictures are left out, or records of other data, models or code.

    Returns:
        The result: print it, or take ``.rows()``, ``.frame()``, ``.verdict`` and ``.report()``.

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
    values = _recipe(recipe).model_dump() | protocol
    arms = [Arm.parse(norm) for norm in _each(norms)]
    given = {
        "own_norms": norms_in_use(arms),
        "model": model if isinstance(model, str) else name_of(model, "model"),
        "data": _data_name(data),
        "train": train if train is None or isinstance(train, str) else name_of(train, "train"),
        "device": str(parse_device(device)),
        "threads": threads,
        "processes": num_launched(),
    }
    sweep = SweepSpec.checked(
        {
            "protocol": Protocol.checked(values | given),
            "norms": tuple(map(str, arms)),
            "batch_sizes": _each(batch_sizes),
            "seeds": _each(seeds),
            "learning_rates": _each(tune_lr),
        }
    )
    folder = Path(out)
    upkeep = Upkeep(folder=folder, save_weights=save_weights)
    way = Way(out=folder, num_workers=workers, upkeep=upkeep)
    return perform(sweep, way, show or _silent, lambda note: warnings.warn(note, stacklevel=2))


def _recipe(given: Recipe | Mapping[str, Any] | None) -> Recipe:
    return given if isinstance(given, Recipe) else Recipe.checked(given or {})


def _each(given: Any) -> tuple[Any, ...]:
    """Several values; one alone is read as the only one."""
    if isinstance(given, str):
        return parse_arms(given)
    return tuple(given) if isinstance(given, Iterable) else (given,)


def _data_name(given: Any) -> str:
    if isinstance(given, Path):
        return f"{PREFIX}{given}"
    return given if isinstance(given, str) else name_of(given, "data")
