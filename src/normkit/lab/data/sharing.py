"""The data set that a process has opened, for its workers: read once, and in memory once."""

import io
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.lab.data.opening import Key, hold_data, opened_data

LARGE_BYTES = 2**20  # a tensor from this size on goes to a file, which all workers map


@dataclass(frozen=True, slots=True)
class SharedData:
    """What workers need to have the data set of the process that started them.

    Args:
        key: What the data set was opened by.
        content: The data set without its large tensors.
        folder: Has those, a file each.
    """

    key: Key
    content: bytes
    folder: Path

    def take_over(self) -> None:
        """Have the data set in this process, as if it had been opened here."""
        hold_data(self.key, _Unpickler(io.BytesIO(self.content), self.folder).load())

    def remove(self) -> None:
        """Remove the files; those who have mapped them keep what is in them."""
        rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others are in the folder, or it never was
            self.folder.parent.rmdir()


def share_data(folder: Path) -> SharedData | None:
    """Prepare the data set that is open in this process for its workers.

    Args:
        folder: Where large tensors may be written.

    Returns:
        It, or None where nothing is open, a user's function made it, or there is no room: then
        each worker opens it anew.
    """
    opened = opened_data()
    if opened is None:
        return None
    key, dataset = opened
    shared = SharedData(key, b"", folder / f"data-{os.getpid()}")
    content = io.BytesIO()
    try:
        _Pickler(content, shared.folder).dump(dataset)
    except OSError:
        shared.remove()
        return None
    return SharedData(key, content.getvalue(), shared.folder)


class _Pickler(pickle.Pickler):
    """Leaves large tensors out, and writes them to files."""

    def __init__(self, file: io.BytesIO, folder: Path) -> None:
        super().__init__(file)
        self._folder, self._num_files = folder, 0

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or obj.nbytes < LARGE_BYTES:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        np.save(_file(self._folder, self._num_files), obj.cpu().numpy())
        self._num_files += 1
        return self._num_files - 1


class _Unpickler(pickle.Unpickler):
    """Maps them; a change to what is in memory stays this process's own."""

    def __init__(self, file: io.BytesIO, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder

    def persistent_load(self, pid: int) -> Tensor:
        return torch.from_numpy(np.load(_file(self._folder, pid), mmap_mode="c"))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.npy"
