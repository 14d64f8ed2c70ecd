"""What a sweep would take, from one measured step of each cell; nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from normkit.lab.check import check
from normkit.lab.comparison import select
from normkit.lab.data.opening import forget_data
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.frozen import Frozen
from normkit.lab.loop import Loop, num_updates
from normkit.lab.measure import peak_step_bytes
from normkit.lab.recipe import Timetable
from normkit.lab.records import TrainingRecord, read_records, sources_of
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import TaskData, TaskRun, parse_task
from normkit.lab.text import MISSING, aligned, duration_text, size_text

NUM_TIMED_STEPS = 3
TITLE = "What it would take"
HEAD = ("norm", "batch", "runs", "steps a run", "time a step", "memory", "time in all")
MEASURED = (
    "{} of training steps, one run after the other; evaluation comes on top. Nothing was trained."
)
OF_RECORDS = "{} by the runs that have a record, one run after the other. Nothing was run."
UNKNOWN = (
    "Only the function knows its steps, so time and memory are not known before each norm and "
    "batch size was run once: give one seed first. Nothing was run."
)
NOT_OF_A_STEP: Mapping[str, object] = MappingProxyType({"data": "", "limit": None, "task": ""})
"""What a step does not depend on, where the shape of the data is known, and the task apart."""

Measured = dict[Hashable, "Steps"]
"""What steps have taken so far, by all that decides it."""


class Estimate(Frozen):
    """What one norm at one batch size takes; None for what is not known.

    Args:
        norm: The norm.
        batch_size: Examples that it sees at a time.
        num_runs: Runs of the cell.
        num_steps: Steps of the optimizer in each.
        step_time_s: Median time of a step, after the first.
        peak_bytes: Memory at the peak of a step.
        run_time_s: Time of a whole run, where it was run before and its steps were not measured.
    """

    norm: str
    batch_size: int
    num_runs: int
    num_steps: int | None = None
    step_time_s: float | None = None
    peak_bytes: int | None = None
    run_time_s: float | None = None

    @property
    def duration_s(self) -> float | None:
        """Time of all runs of the cell, one after the other: of the steps alone if measured."""
        if self.num_steps is not None and self.step_time_s is not None:
            return self.num_runs * self.num_steps * self.step_time_s
        return None if self.run_time_s is None else self.num_runs * self.run_time_s

    def row(self) -> dict[str, Any]:
        """The values by name, with ``duration_s``."""
        return self.model_dump() | {"duration_s": self.duration_s}

    @property
    def words(self) -> tuple[str, ...]:
        """The row of the table."""
        step, size, whole = self.step_time_s, self.peak_bytes, self.duration_s
        return (
            self.norm,
            str(self.batch_size),
            str(self.num_runs),
            MISSING if self.num_steps is None else f"{self.num_steps:,}",
            MISSING if step is None else f"{1000 * step:.3g} ms",
            MISSING if size is None else size_text(size),
            MISSING if whole is None else duration_text(whole),
        )


class DryRun(Frozen):
    """What a sweep would take; printed, it is a table.

    Args:
        cells: One for each norm and batch size.
    """

    cells: tuple[Estimate, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each norm and batch size: runs, steps, time and memory."""
        return [cell.row() for cell in self.cells]

    @property
    def duration_s(self) -> float | None:
        """Time of all runs, one after the other; None if a cell's is not known."""
        each = [cell.duration_s for cell in self.cells]
        return None if None in each else sum(filter(None, each))

    def __str__(self) -> str:
        table = aligned([HEAD, *(cell.words for cell in self.cells)])
        return "\n".join([TITLE, *table, self._sentence])

    @property
    def _sentence(self) -> str:
        if self.duration_s is None:
            return UNKNOWN
        is_measured = all(cell.step_time_s is not None for cell in self.cells)
        return (MEASURED if is_measured else OF_RECORDS).format(duration_text(self.duration_s))


def dry_run_of(sweep: SweepSpec, out: Path) -> DryRun:
    """Say what a sweep would take; nothing is trained and nothing written.

    The runs of a user's function cannot be measured before: their time is that of those which have
    a record.

    Args:
        sweep: What would be run.
        out: Folder of the records.

    Raises:
        NormError: If something is wrong with what is asked for.
    """
    forget_data()  # files may have changed since it was last read
    protocol = sweep.protocol
    if check(sweep) is None:
        known = read_records(out, TrainingRecord).records
        sources = sources_of(protocol, None)
        return DryRun(cells=_of_records(sweep, [r for r in known if sources.made(r)]))
    data = parse_task(protocol.task).sample(protocol).data
    return DryRun(cells=tuple(estimate(sweep, data)))


def _of_records(sweep: SweepSpec, records: Iterable[TrainingRecord]) -> tuple[Estimate, ...]:
    """The runs of a user's function, timed by those of the same protocol that have finished."""
    ours = [
        record
        for record in records
        if record.spec.protocol == sweep.protocol and record.outcome.status == "finished"
    ]
    cells = []
    for norm, batch_size in ((norm, size) for norm in sweep.norms for size in sweep.batch_sizes):
        done = select(ours, norm, batch_size)
        cells.append(
            Estimate(
                norm=norm,
                batch_size=batch_size,
                num_runs=len(sweep.seeds),
                num_steps=max((record.outcome.num_steps for record in done), default=None),
                run_time_s=median(record.duration_s for record in done) if done else None,
            )
        )
    return tuple(cells)


def estimate(
    sweep: SweepSpec,
    data: TaskData,
    most_examples: int | None = None,
    measured: Measured | None = None,
) -> list[Estimate]:
    """Take four steps of each cell on training examples, and measure them.

    Args:
        sweep: What would be run.
        data: Of the sweep's task.
        most_examples: One step of one batch of at most so many examples is measured; time and
            memory are scaled to the batch, and time to the batches of a step. By default four whole
            steps are measured, and nothing is scaled.
        measured: Of other sweeps; cells that differ in the number of examples only are measured
            once. Filled in place.

    Raises:
        NormError: If a network cannot be built.
    """
    return [
        _cell(
            next(s for s in sweep.runs() if (s.norm, s.batch_size) == cell),
            data,
            sweep.runs_of_a_cell,
            partial(_measured, most_examples, {} if measured is None else measured),
        )
        for cell in ((norm, size) for norm in sweep.norms for size in sweep.batch_sizes)
    ]


class Steps(NamedTuple):
    """How many steps a training has, and what one takes."""

    num_steps: int
    step_time_s: float
    peak_bytes: int


def _cell(
    spec: TrainingSpec,
    data: TaskData,
    num_runs: int,
    measured: Callable[[TrainingSpec, TaskData], Steps],
) -> Estimate:
    timetable = _timetable(spec.protocol, data.num_examples, spec.batch_size)
    steps = measured(spec, data)._replace(num_steps=timetable.num_steps)
    return Estimate(
        norm=spec.norm, batch_size=spec.batch_size, num_runs=num_runs, **steps._asdict()
    )


def _measured(
    most_examples: int | None, known: Measured, spec: TrainingSpec, data: TaskData
) -> Steps:
    """What a step of a run takes, measured unless it is known."""
    protocol, task = spec.protocol, parse_task(spec.protocol.task)
    key = (
        spec.model_copy(update={"protocol": protocol.model_copy(update=dict(NOT_OF_A_STEP))}),
        (type(task), task.model_dump_json(exclude=set(task.costless))),
        (data.input_shape, data.num_classes, min(data.num_examples, spec.batch_size)),
    )
    if key not in known:
        with threads_of(protocol.threads), seeded(spec.seed, parse_device(protocol.device)):
            run = task.start(spec, data, task.build(spec, data).model)
            known[key] = measure_steps(run, protocol, spec.batch_size, most_examples)
    return known[key]


def measure_steps(
    run: TaskRun, protocol: Protocol, batch_size: int, most_examples: int | None = None
) -> Steps:
    """Take a few steps of a training, and measure them on one process.

    Args:
        run: The training.
        protocol: Its recipe, and where it computes.
        batch_size: Examples of a batch.
        most_examples: As in :func:`estimate`.
    """
    timetable = _timetable(protocol, len(run.examples), batch_size)
    size = min(batch_size, len(run.examples), most_examples or batch_size)
    scale = batch_size / size
    alone = protocol.model_copy(update={"processes": 1, "strategy": "auto"})
    loop = Loop(run.network, alone, timetable.rate(0), parse_device(protocol.device), run)
    part = run.examples.take(torch.arange(size))
    num_parts = 1 if most_examples else protocol.accumulate
    parts = [part.to(loop.device)] * num_parts
    loop.model.train()
    peak = peak_step_bytes(lambda: loop.step(parts), loop.network, loop.optimizer)
    times = [_timed(loop, parts) for _ in range(1 if most_examples else NUM_TIMED_STEPS)]
    return Steps(
        num_steps=timetable.num_steps,
        step_time_s=scale * protocol.accumulate / num_parts * median(times),
        peak_bytes=round(scale * peak),
    )


def _timetable(protocol: Protocol, num_examples: int, batch_size: int) -> Timetable:
    updates = num_updates(num_examples, batch_size, protocol)
    return Timetable(protocol, updates, protocol.step_examples(batch_size))


def _timed(loop: Loop, parts: Sequence) -> float:
    started = time.perf_counter()
    loop.step(parts)
    if loop.device.type == "cuda":
        torch.cuda.synchronize(loop.device)
    return time.perf_counter() - started
