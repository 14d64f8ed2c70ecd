"""What tells that the files of a data set are others than before."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from normkit.errors import DataError
from normkit.lab.data.folder import DECODED_AT_ONCE
from normkit.text import printable

NUM_DIGITS = 12


def fingerprint_of_files(files: Iterable[tuple[str, Path]], *more: str) -> str:
    """Twelve digits over names and contents of files; over names and sizes if there are very many.

    Args:
        files: What each file is in the data set, such as its place and class, and its path.
        more: Further texts that decide the data.

    Raises:
        DataError: If a file cannot be read.
    """
    listed = list(files)
    digest = hashlib.sha256("\n".join(more).encode())
    for name, path in listed:
        try:
            size = path.stat().st_size
            content = path.read_bytes() if len(listed) <= DECODED_AT_ONCE else b""
        except OSError as error:
            raise DataError(
                f"{printable(path)} cannot be read: {error.strerror}; put it there, or take it out "
                f"of the data"
            ) from error
        digest.update(f"{name} {size}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:NUM_DIGITS]
