"""The progress display of a sweep, on the standard error."""

from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from normkit.cli.streams import Terminal
from normkit.lab.check import num_steps
from normkit.lab.records import TrainingRecord
from normkit.lab.spec import TrainingSpec

STEP_OVERHEAD = 32  # the fixed cost of a training step, in examples


@contextmanager
def sweep_progress(specs: Sequence[TrainingSpec], num_examples: int) -> Generator["SweepProgress"]:
    """Show the progress of the runs and the time that is left, until the block ends."""
    columns = (
        TextColumn("{task.fields[ended]} of {task.fields[runs]} runs"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("remaining"),
    )
    console = Terminal(stderr=True)
    if not console.is_terminal:  # no bar is drawn, and the first run may take long
        number = "1 run begins; it" if len(specs) == 1 else f"{len(specs)} runs begin; each"
        console.print(f"{number} has a line here when it ends", highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, speed_estimate_period=120) as display:
        yield SweepProgress(display, specs, num_examples)


class SweepProgress:
    """Adds up the steps of all runs, and prints a line for each run that ends."""

    def __init__(self, display: Progress, specs: Sequence[TrainingSpec], num_examples: int) -> None:
        self._display = display
        self._num_examples = num_examples
        self._done: Counter[str] = Counter()
        self._num_ended = 0
        self._task = display.add_task(
            "runs", total=sum(map(self._whole_cost, specs)), ended=0, runs=len(specs)
        )

    def on_steps(self, spec: TrainingSpec, num_steps: int) -> None:
        """Advance by some steps of a run."""
        self._done[spec.key] += num_steps
        self._display.advance(self._task, _cost(spec, num_steps))

    def on_record(self, record: TrainingRecord) -> None:
        """Advance to the end of a run, whether it finished or failed."""
        spec = record.spec
        rest = self._whole_cost(spec) - _cost(spec, self._done[spec.key])
        self._num_ended += 1
        self._display.update(self._task, advance=rest, ended=self._num_ended)
        self._display.console.print(_line(record), highlight=False, markup=False, soft_wrap=True)

    def _whole_cost(self, spec: TrainingSpec) -> int:
        return _cost(spec, num_steps(spec, self._num_examples))


def _cost(spec: TrainingSpec, steps: int) -> int:
    return steps * (STEP_OVERHEAD + spec.batch_size)


def _line(record: TrainingRecord) -> str:
    spec, outcome = record.spec, record.outcome
    name = f"{spec.norm}, batch size {spec.batch_size}, seed {spec.seed}"
    if record.score is None:
        return f"{name}: {outcome.status}: {outcome.message or 'its score is not finite'}"
    if record.spec.protocol.train is None:
        return f"{name}: {100 * record.score:.2f} % in {record.duration_s:.1f} s"
    known = {key: value for key, value in outcome.scores.items() if value is not None}
    scores = ", ".join(f"{key} {value:.4g}" for key, value in known.items())
    return f"{name}: {scores} in {record.duration_s:.1f} s"
