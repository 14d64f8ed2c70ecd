"""Sources of the named data sets: one function each, in one registry."""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from normkit.errors import DataError, SpecError
from normkit.lab.data.dataset import Dataset, Pictures, assembled, fingerprint_of, hold_out
from normkit.lab.data.idx import read_idx
from normkit.lab.torchvision_ops import register_missing_operators
from normkit.text import printable

FOLDER_VARIABLE = "NORMKIT_DATA"
OFFICE = ("office31-amazon", "office31-dslr", "office31-webcam")
OF_FOLDERS = ("imagenet", "caltech256", *OFFICE)  # these are read by ``papers.py``
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


class Source(NamedTuple):
    """Training pictures of a data set, and its test and validation pictures if it has them."""

    pictures: Pictures
    test: Pictures | None
    validation: Pictures | None = None


Reader = Callable[[], Source]
READERS: dict[str, Reader] = {}


def reader(name: str) -> Callable[[Reader], Reader]:
    """Register a data set's reader under its name."""

    def register(function: Reader) -> Reader:
        if name in READERS:
            raise SpecError(f"data set {name!r} already has a reader: {READERS[name].__name__}")
        READERS[name] = function
        return function

    return register


def read(name: str, limit: int | None = None) -> Dataset[Pictures]:
    """Read a data set that the lab knows, split and scaled.

    Args:
        name: A key of ``READERS``.
        limit: Number of training examples to keep, ``None`` for all.

    Raises:
        SpecError: If there is no such data set.
        DataError: If its files are missing or unreadable.
    """
    if name not in READERS:
        raise SpecError(
            f"there is no data set {printable(name)!r}; known are {', '.join(READERS)}, "
            f"{', '.join(OF_FOLDERS)}, a folder that there is and that has a folder for each "
            f"class, as ./PATH or folder:PATH, and FILE.py:FUNCTION that makes data sets"
        )
    source = READERS[name]()
    own = {"validation": source.validation, "test": source.test}
    parts = {"train": source.pictures} | {part: p for part, p in own.items() if p is not None}
    return assembled(name, parts, fingerprint_of([*parts.values()]), limit)


def data_folder() -> Path:
    """Folder for downloaded data: ``$NORMKIT_DATA``, or one in the user's cache."""
    return Path(os.environ.get(FOLDER_VARIABLE, "~/.cache/normkit/data")).expanduser()


@reader("digits")
def digits() -> Source:
    """1797 grey 8x8 digits that come with scikit-learn."""
    bunch = importlib.import_module("sklearn.datasets").load_digits()
    return Source(_pictures(bunch.images[:, None], bunch.target), None)


@reader("fashion-mnist")
def fashion_mnist() -> Source:
    """70000 grey 28x28 pictures of clothes: Debian's files if installed, else a download."""
    if not FASHION_MNIST_FOLDER.is_dir():
        return _from_torchvision("FashionMNIST")
    return Source(_idx_pictures("train"), _idx_pictures("t10k"))


@reader("cifar10")
def cifar10() -> Source:
    """60000 colour 32x32 pictures in 10 classes."""
    return _from_torchvision("CIFAR10")


@reader("cifar100")
def cifar100() -> Source:
    """60000 colour 32x32 pictures in 100 classes."""
    return _from_torchvision("CIFAR100")


@reader("svhn")
def svhn() -> Source:
    """99289 colour 32x32 house numbers."""
    return _from_torchvision("SVHN", *_SVHN)


@reader("mnist")
def mnist() -> Source:
    """70000 grey 28x28 digits."""
    return _from_torchvision("MNIST")


@reader("cifar100-40k")
def cifar100_40k() -> Source:
    """CIFAR-100 with 40000 training and 10000 validation pictures: Summers and Dinneen, 4.1."""
    return _fifth_held_out(_from_torchvision("CIFAR100"))


@reader("svhn-extra")
def svhn_extra() -> Source:
    """630420 colour 32x32 house numbers, with the part ``extra``: Summers and Dinneen, 4.1.

    Of the 604388 that are not for the test, a fifth is for validation.
    """
    return _fifth_held_out(_from_torchvision("SVHN", *_SVHN, {"split": "extra"}))


def _fifth_held_out(source: Source) -> Source:
    kept, held = hold_out(source.pictures.targets, 0.2)
    return Source(source.pictures.keep(kept), source.test, source.pictures.keep(held))


def _idx_pictures(part: str) -> Pictures:
    images = read_idx(FASHION_MNIST_FOLDER / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(FASHION_MNIST_FOLDER / f"{part}-labels-idx1-ubyte.gz")
    return _pictures(images[:, None].numpy(), labels.numpy())


_TRAIN_FLAGS = {"train": True}, {"train": False}
_SVHN = {"split": "train"}, {"split": "test"}


def _from_torchvision(name: str, *parts: Mapping[str, Any]) -> Source:
    """Load a data set of torchvision.

    ``parts`` are the options of its training set, its test set, and of further training sets.
    """
    register_missing_operators()
    dataset = getattr(importlib.import_module("torchvision.datasets"), name)
    folder = data_folder()
    try:
        found = [dataset(folder, download=True, **part) for part in parts or _TRAIN_FLAGS]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} is not in {folder} and cannot be downloaded ({error}); connect to the "
            f"network, or copy torchvision's files there, or set {FOLDER_VARIABLE} to their folder"
        ) from error
    train, test, *more = map(_torchvision_pictures, found)
    for others in more:
        train = train.joined(others)
    return Source(train, test)


def _torchvision_pictures(dataset: object) -> Pictures:
    """Pictures of a torchvision data set, whose attributes differ in name and axis order."""
    images = np.asarray(getattr(dataset, "data"))  # noqa: B009 -- pyright knows no such attribute
    labels = getattr(dataset, "labels", None)  # SVHN's, already channels first
    if labels is not None:
        return _pictures(images, labels)
    targets = np.asarray(getattr(dataset, "targets"))  # noqa: B009 -- as above
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return _pictures(images, targets)


def _pictures(images: np.ndarray, targets: np.ndarray) -> Pictures:
    return Pictures(
        values=torch.from_numpy(np.ascontiguousarray(images, dtype=np.uint8)),
        targets=torch.from_numpy(np.asarray(targets, dtype=np.int64)),
    )
