"""Sharing an opened data set with worker processes, so that it is read and stored once."""

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

LARGE_BYTES = 2**20  # tensors of at least this size are written to files, which all workers map


@dataclass(frozen=True, slots=True)
class SharedData:
    """The data set of a process, in the form that its workers get.

    Args:
        key: The arguments that the data set was opened with.
        content: The pickled data set without its large tensors.
        folder: Folder with the large tensors, one file each.
    """

    key: Key
    content: bytes
    folder: Path

    def take_over(self) -> None:
        """Open the shared data set in this process."""
        hold_data(self.key, _Unpickler(io.BytesIO(self.content), self.folder).load())

    def remove(self) -> None:
        """Remove the files; processes that have mapped them keep their contents."""
        rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # the folder above is not empty, or does not exist
            self.folder.parent.rmdir()


def share_data(folder: Path) -> SharedData | None:
    """Prepare the data set that is open in this process for its workers.

    Args:
        folder: Folder for large tensors.

    Returns:
        The shared data set. None if no data set is open, a user's function made it, or the disk is
        full; then each worker opens the data set itself.
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
    """Writes large tensors to files instead of into the pickle."""

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
    """Maps large tensors from files; changes in memory are not written to the files."""

    def __init__(self, file: io.BytesIO, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder

    def persistent_load(self, pid: int) -> Tensor:
        return torch.from_numpy(np.load(_file(self._folder, pid), mmap_mode="c"))


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.npy"
