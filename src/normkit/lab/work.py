"""What any kind of run is to those who carry many out: how it is done, and beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

from pydantic import Field

from normkit.errors import SpecError
from normkit.lab.frozen import Count, Frozen
from normkit.lab.loggers import require_loggers
from normkit.lab.records import Record, Sources
from normkit.lab.resume import FOLDER, SECONDS, SUFFIX, Checkpoint, SharedCheckpoint
from normkit.lab.spec import RunSpec

S = TypeVar("S", bound=RunSpec)
R = TypeVar("R", bound=Record)
S_contra = TypeVar("S_contra", bound=RunSpec, contravariant=True)
R_contra = TypeVar("R_contra", bound=Record, contravariant=True)

MAX_PROCESSES = 1024
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
        probe_every: The steps after which these get a probe's numbers again; None for no probe.
    """

    folder: Path | None = None
    checkpoint_seconds: float = SECONDS
    save_weights: bool = False
    data_workers: int = 0
    loggers: tuple[str, ...] = ()
    probe_every: int | None = None

    def checkpoint(self, spec: RunSpec, sources: Sources) -> Checkpoint | None:
        """Where a run's state is kept until it has ended; None without a folder."""
        if self.folder is None:
            return None
        path = self.folder / FOLDER / f"{spec.key}-{sources.key}{SUFFIX}"
        return Checkpoint(path, self.checkpoint_seconds)

    def shared_checkpoint(self, spec: RunSpec, sources: Sources) -> SharedCheckpoint | None:
        """The same of a run on several processes, which have all met."""
        if self.folder is None:
            return None
        name = f"{spec.key}-{sources.key}"
        return SharedCheckpoint(self.folder / FOLDER, name, self.checkpoint_seconds)


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


class RunOptions(Frozen):
    """How runs are done, as a user asks for it; none of it changes their outcome."""

    out: str = Field(default="runs/compare", description="a folder")
    workers: int | None = Field(
        default=None, ge=1, le=MAX_PROCESSES, description="runs at once, 1 or more, or none"
    )
    data_workers: int = Field(
        default=0, ge=0, le=MAX_PROCESSES, description=f"0 to {MAX_PROCESSES} processes"
    )
    cluster: Literal["ray"] | None = Field(default=None, description="ray, or none")
    checkpoint_seconds: float = Field(default=SECONDS, ge=0, description="0 or more")
    save_weights: bool = Field(default=False, description="yes or no")
    loggers: tuple[str, ...] = Field(
        default=(), description="tensorboard, csv, wandb, mlflow, or several with commas between"
    )

    probe_every: Count | None = Field(
        default=None, description="the steps between two records of a probe, 1 or more, or none"
    )

    def way(self, command: str = "") -> "Way":
        """What the runs are carried out by.

        Args:
            command: What makes the report again, for the page.

        Raises:
            SpecError: If there is no such logger, none for a probe, or a cluster's machines would
                keep what is asked for.
            PackageError: If its package is missing.
        """
        require_loggers(self.loggers)
        if self.probe_every is not None and not self.loggers:
            raise SpecError(
                f"--probe-every was given {self.probe_every} without --loggers, which get what the "
                f"probe finds; give --loggers csv or tensorboard too"
            )
        if self.cluster is not None and (self.save_weights or self.loggers):
            option = "--save-weights" if self.save_weights else "--loggers"
            raise SpecError(
                f"{option} was given with --cluster {self.cluster}, whose machines send home "
                f"records only; leave {option} out, or run without --cluster"
            )
        folder = Path(self.out)
        upkeep = Upkeep(
            folder=folder,
            checkpoint_seconds=self.checkpoint_seconds,
            save_weights=self.save_weights,
            data_workers=self.data_workers,
            loggers=self.loggers,
            probe_every=self.probe_every,
        )
        return Way(
            out=folder,
            num_workers=self.workers,
            upkeep=upkeep,
            cluster=self.cluster,
            command=command,
        )


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
    cluster: Literal["ray"] | None = None
    command: str = ""

    @property
    def options(self) -> RunOptions:
        """The same as a user asks for it."""
        upkeep = self.upkeep
        return RunOptions(
            out=str(self.out.resolve()),
            workers=self.num_workers,
            data_workers=upkeep.data_workers,
            cluster=self.cluster,
            checkpoint_seconds=upkeep.checkpoint_seconds,
            save_weights=upkeep.save_weights,
            loggers=upkeep.loggers,
            probe_every=upkeep.probe_every,
        )
