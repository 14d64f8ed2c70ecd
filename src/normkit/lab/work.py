"""What any kind of run is to those who carry many out: how it is done, and beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from normkit.lab.records import Record, Sources
from normkit.lab.resume import FOLDER, SECONDS, Checkpoint
from normkit.lab.spec import RunSpec

S = TypeVar("S", bound=RunSpec)
R = TypeVar("R", bound=Record)
S_contra = TypeVar("S_contra", bound=RunSpec, contravariant=True)
R_contra = TypeVar("R_contra", bound=Record, contravariant=True)

OnStep = Callable[[], object]  # called after each training step


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What is done beside a run and changes nothing of its outcome.

    Args:
        folder: Where checkpoints and weights go; None for neither.
        checkpoint_seconds: Time between two checkpoints; 0 for one after every step.
        save_weights: Whether the trained weights are written, to ``weights/``.
        data_workers: Processes that read pictures ahead.
        loggers: Names of loggers that get every epoch's figures.
    """

    folder: Path | None = None
    checkpoint_seconds: float = SECONDS
    save_weights: bool = False
    data_workers: int = 0
    loggers: tuple[str, ...] = ()

    def checkpoint(self, spec: RunSpec, sources: Sources) -> Checkpoint | None:
        """Where a run's state is kept until it has ended; None without a folder."""
        if self.folder is None:
            return None
        path = self.folder / FOLDER / f"{spec.key}-{sources.key}.safetensors"
        return Checkpoint(path, self.checkpoint_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Generic[S, R]):
    """How runs of one kind are done. Both functions are importable: other processes call them.

    Args:
        run: Does a run, which never raises for what is wrong with this run alone.
        failed: The record of a run that ended without one, with a message.
    """

    run: Callable[[S, OnStep, Upkeep], R]
    failed: Callable[[S, str], R]


class Watcher(Protocol[S_contra, R_contra]):
    """Is told what a sweep is doing."""

    def on_steps(self, spec: S_contra, num_steps: int) -> None:
        """A run has done so many more steps."""
        ...

    def on_record(self, record: R_contra) -> None:
        """A run has ended and its record is on the disk."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How the runs are done, which changes nothing of their outcome.

    Args:
        out: Folder of records, report, checkpoints and weights.
        num_workers: Runs at once; None for as many as the machine has room for.
        upkeep: What is done beside each run.
        cluster: ``"ray"`` for a Ray cluster, or None for this machine.
        command: What makes the report again, for the page.
    """

    out: Path
    num_workers: int | None = None
    upkeep: Upkeep
    cluster: str | None = None
    command: str = ""
