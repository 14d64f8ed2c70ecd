"""Runs on the machines of a Ray cluster."""

import logging
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from normkit.errors import DataError, PackageError
from normkit.lab.environment import code_hash
from normkit.lab.records import append_record
from normkit.lab.spec import RunSpec
from normkit.lab.user_code import PREFIX
from normkit.lab.work import R, S, Upkeep, Watcher, Work
from normkit.text import shortened

ADDRESS = "RAY_ADDRESS"
CONNECT_S = 10
TRIES_ELSEWHERE = 5  # of a run whose machine has gone
MARK = ".cluster-"  # begins the name of a file that says whose folder it is


def run_on_ray(
    specs: Sequence[S], upkeep: Upkeep, watcher: Watcher[S, R], work: Work[S, R]
) -> None:
    """Run each spec as a task of its own; its record comes home as soon as it ends.

    A task takes the run's threads as CPUs, and a GPU if it computes on one. If its machine or
    process goes, it is done again on another one: from its last checkpoint if that machine has this
    folder at the same path, as machines with shared files have, else from the first step. Files
    that the specs name, data and models, must be at the same path on all machines, and so must
    normkit, in the same version.

    Args:
        specs: Runs, handed out in this order.
        upkeep: Its folder is this machine's; only checkpoints are written there by others.
        watcher: Is told of records.
        work: How they are done.

    Raises:
        PackageError: If Ray is not installed.
        DataError: If the cluster cannot be reached, or a machine has another normkit.
    """
    folder = upkeep.folder
    if folder is None:
        raise DataError("runs on a cluster need a folder for their records; none was given")
    _require_known(specs)
    with joined_cluster() as ray, _marked(folder) as mark:
        remote = ray.remote(max_retries=TRIES_ELSEWHERE)(_done)
        waiting = {
            remote.options(**_resources(spec)).remote(spec, work, upkeep, code_hash(), mark): spec
            for spec in specs
        }
        try:
            while waiting:
                (done, *_), _ = ray.wait(list(waiting), num_returns=1)
                record = _record(ray, done, waiting.pop(done), work)
                append_record(folder, record)
                watcher.on_record(record)
        finally:
            for task in waiting:
                ray.cancel(task, force=True)


def _resources(spec: RunSpec) -> dict[str, float]:
    return {"num_cpus": spec.num_threads, "num_gpus": 1 if spec.uses_gpu else 0}


@contextmanager
def _marked(folder: Path) -> Iterator[Path]:
    """Put a file into the folder by which a machine sees whether it has the same folder."""
    mark = folder.resolve() / f"{MARK}{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _done(spec: S, work: Work[S, R], upkeep: Upkeep, expected: str, mark: Path) -> R:
    """What a machine of the cluster does.

    Args:
        spec: The run.
        work: How it is done.
        upkeep: As the one who asked has it.
        expected: His version of the code.
        mark: A file in his folder.
    """
    if code_hash() != expected:
        raise DataError(
            f"this machine of the cluster ({os.uname().nodename}) has another version of normkit; "
            f"install the same one on all"
        )
    folder = mark.parent if mark.exists() else None
    return work.run(spec, _nothing, replace(upkeep, folder=folder))


def _nothing() -> None:
    """Tell nobody of a step."""


def _record(ray: Any, task: Any, spec: S, work: Work[S, R]) -> R:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        return work.failed(
            spec, f"its machine has gone {TRIES_ELSEWHERE} times ({shortened(error)})"
        )


def _require_listener(address: str | None) -> None:
    """Fail at once where nobody listens; Ray itself tries for minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def _require_known(specs: Sequence[RunSpec]) -> None:
    for spec in specs:
        held = [n for n in spec.own_names if n.startswith(PREFIX)]
        if held:
            raise DataError(
                f"{', '.join(held)} is known only to this process; define the function at the top "
                f"of a file, or leave the cluster out"
            )


@contextmanager
def joined_cluster() -> Iterator[Any]:
    """Join the cluster that is there, or start one on this machine, until the block ends.

    Raises:
        PackageError: If Ray is not installed.
        DataError: If the cluster cannot be reached.
    """
    try:
        import ray  # an extra
    except ModuleNotFoundError as error:
        raise PackageError(
            "--cluster ray needs Ray: pip install 'normkit[cluster]'; or leave --cluster out"
        ) from error
    joined = ray.is_initialized()
    if not joined:
        address = os.environ.get(ADDRESS)
        try:
            _require_listener(address)
            ray.init(
                address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(
                f"the Ray cluster at {ADDRESS}={address} cannot be reached "
                f"({shortened(error)}); start it by ray start --head, or unset {ADDRESS} to use "
                f"this machine alone"
            ) from error
    try:
        yield ray
    finally:
        if not joined:
            ray.shutdown()
