"""Opening a data set by a name, a folder, a function, or data sets that a user has given."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from normkit.errors import SpecError
from normkit.lab.data.dataset import Dataset, Examples, Split, loaded
from normkit.lab.data.folder import PREFIX, read_folder
from normkit.lab.data.given import read_given
from normkit.lab.data.known import data_text
from normkit.lab.data.papers import open_folder
from normkit.lab.data.sources import READERS, read
from normkit.lab.user_code import HELD, is_reference, load_function, users_errors

Key = tuple[str, int | None, int | None]
NUM_KEPT = 2  # a task may have two data sets
_opened: dict[Key, Dataset[Split]] = {}  # those opened last, in this order


def open_data(
    text: str, limit: int | None = None, side: int | None = None, hold_out: bool = True
) -> Dataset[Split]:
    """Open a data set, split and scaled.

    Args:
        text: A name such as ``digits`` or ``caltech256:seed=1``; ``./PATH`` or ``folder:PATH`` with
            a folder for each class; or ``FILE.py:FUNCTION``, a function without arguments that
            returns data sets.
        limit: Number of training examples to keep, ``None`` for all.
        side: Height and width of the network's inputs, for folders and functions; by default the
            size of the pictures.
        hold_out: Whether validation examples are kept out of training. If not, they are also
            trained on, as in papers that train on all examples.

    Raises:
        SpecError: If there is no such data set or function, or its pictures have one size only.
        DataError: If it cannot be read.
    """
    text = data_text(text)
    found = opened_once((text, limit, side), lambda: _read(text, limit, side))
    return found if hold_out else replace(found, train=found.train.joined(found.validation))


def opened_once(key: Key, read: Callable[[], Dataset[Split]]) -> Dataset[Split]:
    """The data set that was opened last if it was opened by this key, else what is read now."""
    if key not in _opened:
        hold_data(key, read())
    return _opened[key]


def _read(text: str, limit: int | None, side: int | None) -> Dataset[Split]:
    if text.startswith(PREFIX):
        return read_folder(Path(text.removeprefix(PREFIX)).expanduser(), limit, side)
    if is_reference(text):
        make = load_function(text, "--data") if text not in HELD else HELD[text]
        with users_errors(text):
            given = make() if callable(make) else make
        return read_given(given, text.rpartition("/")[2], limit, side)
    found = open_folder(text, limit, side)
    if found is not None:
        return found
    if side is not None and text in READERS:
        raise SpecError(
            f"--image-size was given {side}, but {text} has a size of its own; leave it out, or "
            f"give a folder"
        )
    return read(text, limit)


@lru_cache(maxsize=1)
def load(text: str, limit: int | None = None, side: int | None = None) -> Dataset[Examples]:
    """Open a data set and load all its inputs into memory.

    Args:
        text: As in :func:`open_data`.
        limit: Number of training examples to keep, ``None`` for all.
        side: As in :func:`open_data`.

    Raises:
        NormError: As in :func:`open_data`.
    """
    return loaded(open_data(text, limit, side))


def forget_data() -> None:
    """Forget the opened data set, so that it is read again when it is next opened."""
    _opened.clear()
    load.cache_clear()


def hold_data(key: Key, dataset: Dataset[Split]) -> None:
    """Make ``open_data`` return this data set when it is next called with this key."""
    _opened.pop(key, None)
    while len(_opened) >= NUM_KEPT:
        del _opened[next(iter(_opened))]
    _opened[key] = dataset


def opened_data() -> tuple[Key, Dataset[Split]] | None:
    """The data set that was opened last, with its key; None if a user's function made it."""
    found = next(reversed(_opened.items()), None)
    return None if found is None or is_reference(found[0][0]) else found
