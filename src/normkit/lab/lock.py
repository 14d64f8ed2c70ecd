"""One process at a time for a folder, or for a file."""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from normkit.errors import DataError
from normkit.lab.files import file_errors
from normkit.text import printable

LOCK_NAME = ".in-use"


@contextmanager
def only_user(folder: Path) -> Generator[None]:
    """Keep other processes from working in a folder until the block ends.

    The system gives the lock back when this process ends, also when it is killed.

    Args:
        folder: It exists.

    Raises:
        DataError: If another process works in it, which the message names.
    """
    path = folder / LOCK_NAME
    with file_errors(path):
        descriptor = _locked(path)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def in_turn(path: Path) -> Generator[None]:
    """Let one process at a time into the block, for a file that it makes; others wait until then.

    Args:
        path: The file, whose folder exists; the lock lies beside it.
    """
    lock = path.with_name(f"{path.name}{LOCK_NAME}")
    with file_errors(lock):
        descriptor = _locked(lock, waits=True)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, *, waits: bool = False) -> int:
    """Open and lock the file; the process before may remove it in between, then once more."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise DataError(
                f"{printable(path.parent)} is in use by {printable(who)}; wait until it ends, or "
                f"give another folder with --out"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)
