"""Folders that can be written to, and files that appear whole or not at all."""

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from normkit.errors import DataError
from normkit.text import printable


def usable_folder(folder: Path, *names: str, option: str = "--out") -> Path:
    """Make the folder if needed and make sure that files can be written in it.

    Args:
        folder: The folder.
        names: Files that will be written in it; those that are there must be writable files.
        option: Which one named the folder.

    Raises:
        DataError: If the folder cannot be made or written to, or one of the files cannot.
    """
    probe = folder / f".{os.getpid()}.writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise DataError(
            f"the output folder {printable(folder)} cannot be written to ({_why(error)}); "
            f"give another one with {option}"
        ) from error
    for name in names:
        _require_writable(folder / name, option)
    return folder


def _require_writable(path: Path, option: str) -> None:
    with file_errors(path, option):
        if not path.exists():
            return
        if path.is_file():
            path.open("ab").close()
            return
    raise DataError(f"{printable(path)} is no file; move it away or give another one with {option}")


def require_file(path: Path) -> None:
    """Refuse what cannot be read as a file.

    Raises:
        DataError: If there is none, it is a folder or a device, or its name cannot be one.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(
            f"{printable(path)} cannot be read: {error.strerror}; give a file that is there"
        ) from error
    except ValueError as error:  # a name with a zero byte
        raise DataError(f"{printable(path)} is no name of a file: {error}; give one") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise DataError(f"{printable(path)} is {kind}; give a file")


@contextmanager
def file_errors(path: Path, option: str = "--out") -> Generator[None]:
    """Turn what the system says about a file into a ``DataError`` that names it."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{printable(path)} cannot be read or written ({_why(error)}); "
            f"make room and permission for it, or give another one with {option}"
        ) from error


@contextmanager
def whole_file(path: Path, option: str = "--out") -> Generator[Path]:
    """Write a file in a block, under the name that the block is given; it appears at the end.

    Until then the file is the old one, and so it stays if the block is left by an exception.

    Raises:
        DataError: If it cannot be written.
    """
    draft = path.with_name(f".{os.getpid()}{path.suffix}")  # fits where a long name does
    with file_errors(path, option):
        try:
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())  # else a power cut may leave it empty
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> Path:
    """Write a text to a file, which is the old one until the new one is complete.

    Returns:
        The path.

    Raises:
        DataError: If it cannot be written.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
