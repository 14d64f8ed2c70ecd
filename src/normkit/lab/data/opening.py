"""A data set by what a user wrote: a name, a folder, a function, or data sets themselves."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from normkit.lab.data.dataset import Dataset, Examples, Split, loaded
from normkit.lab.data.folder import PREFIX, read_folder
from normkit.lab.data.given import read_given
from normkit.lab.data.papers import open_folder
from normkit.lab.data.sources import read
from normkit.lab.user_code import HELD, is_reference, load_function, users_errors

Key = tuple[str, int | None, int | None]
NUM_KEPT = 2  # of a task that has two
_opened: dict[Key, Dataset[Split]] = {}  # the last ones that were opened, the last one last


def open_data(
    text: str, limit: int | None = None, side: int | None = None, hold_out: bool = True
) -> Dataset[Split]:
    """Open a data set, split and scaled.

    Args:
        text: A name such as ``digits`` or ``caltech256:seed=1``; ``folder:PATH`` with a folder for
            each class; or ``FILE.py:FUNCTION``, a function without arguments that gives data sets.
        limit: Training examples to keep, ``None`` for all.
        side: Height and width of what a network gets, for folders and functions; by default the
            pictures' own.
        hold_out: Whether validation examples are kept from training. Otherwise they are trained
            on as well, as in papers that train on everything.

    Raises:
        SpecError: If there is no such data set or function.
        DataError: If it cannot be read.
    """
    key = (text, limit, side)
    if key not in _opened:
        hold_data(key, _read(text, limit, side))
    found = _opened[key]
    return found if hold_out else replace(found, train=found.train.joined(found.validation))


def _read(text: str, limit: int | None, side: int | None) -> Dataset[Split]:
    if text.startswith(PREFIX):
        return read_folder(Path(text.removeprefix(PREFIX)).expanduser(), limit, side)
    if is_reference(text):
        make = load_function(text, "--data") if text not in HELD else HELD[text]
        with users_errors(text):
            given = make() if callable(make) else make
        return read_given(given, text.rpartition("/")[2], limit, side)
    found = open_folder(text, limit, side)
    return read(text, limit) if found is None else found


@lru_cache(maxsize=1)
def load(text: str, limit: int | None = None) -> Dataset[Examples]:
    """Open a data set and take all its inputs into memory.

    Args:
        text: As :func:`open_data`.
        limit: Training examples to keep, ``None`` for all.

    Raises:
        NormError: As :func:`open_data`.
    """
    return loaded(open_data(text, limit))


def forget_data() -> None:
    """Read a data set anew when it is next asked for."""
    _opened.clear()
    load.cache_clear()


def hold_data(key: Key, dataset: Dataset[Split]) -> None:
    """Give this data set when it is next asked for by what it was opened by."""
    _opened.pop(key, None)
    while len(_opened) >= NUM_KEPT:
        del _opened[next(iter(_opened))]
    _opened[key] = dataset


def opened_data() -> tuple[Key, Dataset[Split]] | None:
    """The data set that was opened last; None if a user's function made it."""
    found = next(reversed(_opened.items()), None)
    return None if found is None or is_reference(found[0][0]) else found
