"""What a sweep would take, from one measured step of each cell; nothing is trained."""

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch

from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.frozen import Frozen
from normkit.lab.loop import Loop, num_updates
from normkit.lab.measure import peak_step_bytes
from normkit.lab.recipe import Timetable
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import TaskData, TaskRun, parse_task

NUM_TIMED_STEPS = 3


class Estimate(Frozen):
    """What one norm at one batch size takes.

    Args:
        norm: The norm.
        batch_size: Examples that it sees at a time.
        num_runs: Runs of the cell.
        num_steps: Steps of the optimizer in each.
        step_time_s: Median time of a step, after the first.
        peak_bytes: Memory at the peak of a step.
    """

    norm: str
    batch_size: int
    num_runs: int
    num_steps: int
    step_time_s: float
    peak_bytes: int

    @property
    def duration_s(self) -> float:
        """Time of the steps of all runs of the cell, one after the other."""
        return self.num_runs * self.num_steps * self.step_time_s


def estimate(sweep: SweepSpec, data: TaskData, most_examples: int | None = None) -> list[Estimate]:
    """Take four steps of each cell on training examples, and measure them.

    Args:
        sweep: What would be run.
        data: Of the sweep's task.
        most_examples: One step of one batch of at most so many examples is measured; time and
            memory are scaled to the batch, and time to the batches of a step. By default four whole
            steps are measured, and nothing is scaled.

    Raises:
        NormError: If a network cannot be built.
    """
    rates = max(1, len(sweep.learning_rates))
    num_runs = len(sweep.seeds) * rates
    return [
        _cell(
            next(s for s in sweep.runs() if (s.norm, s.batch_size) == cell),
            data,
            num_runs,
            most_examples,
        )
        for cell in ((norm, size) for norm in sweep.norms for size in sweep.batch_sizes)
    ]


def _cell(spec: TrainingSpec, data: TaskData, num_runs: int, most_examples: int | None) -> Estimate:
    protocol = spec.protocol
    with threads_of(protocol.threads), seeded(spec.seed, parse_device(protocol.device)):
        task = parse_task(protocol.task)
        run = task.start(spec, data, task.build(spec, data).model)
        steps = measure_steps(run, protocol, spec.batch_size, most_examples)
    return Estimate(
        norm=spec.norm, batch_size=spec.batch_size, num_runs=num_runs, **steps._asdict()
    )


class Steps(NamedTuple):
    """How many steps a training has, and what one takes."""

    num_steps: int
    step_time_s: float
    peak_bytes: int


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
    updates = num_updates(len(run.examples), batch_size, protocol)
    timetable = Timetable(protocol, updates, protocol.step_examples(batch_size))
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


def _timed(loop: Loop, parts: Sequence) -> float:
    started = time.perf_counter()
    loop.step(parts)
    if loop.device.type == "cuda":
        torch.cuda.synchronize(loop.device)
    return time.perf_counter() - started
