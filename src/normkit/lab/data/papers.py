"""Folders of pictures that the papers train on, with the papers' splits."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from normkit.errors import DataError, SpecError
from normkit.lab.data.dataset import SPLIT_SEED, Dataset, Split
from normkit.lab.data.folder import File, class_names, files_of, read_files, read_folder
from normkit.lab.data.sources import FOLDER_VARIABLE, OF_FOLDERS, OFFICE, data_folder
from normkit.text import printable

IMAGENET_SIDE, CALTECH_SIDE = 224, 299
MAX_DIGITS = 9
CALTECH_SIZES = {"train": 40, "validation": 10, "test": 30}
"""Pictures of each class: Summers and Dinneen, section 4.1."""
CLUTTER = "clutter"  # ends the name of Caltech-256's folder 257


def imagenet(limit: int | None = None, side: int | None = None) -> Dataset[Split]:
    """Read ImageNet's folders ``train`` and ``val``; the papers test on ``val``.

    A tenth of the training pictures is held out for validation.

    Args:
        limit: Number of training pictures to keep; None for all.
        side: Height and width of the network's inputs; 224 by default.

    Raises:
        DataError: If the folders do not exist.
    """
    folder = _folder("imagenet", "folders train and val, with a folder for each class in both")
    roots = {"train": folder / "train", "test": folder / "val"}
    for root in roots.values():
        if not root.is_dir():
            raise DataError(f"{printable(folder)} has no folder {root.name}; put one there")
    classes = class_names(roots)
    parts = {part: files_of(root, classes) for part, root in roots.items()}
    return read_files(folder, parts, limit, side or IMAGENET_SIDE)


def caltech256(
    limit: int | None = None, side: int | None = None, *, seed: int = SPLIT_SEED
) -> Dataset[Split]:
    """Read Caltech-256: of each class 40 pictures to train, 10 for validation, 30 for the test.

    They are drawn at random; the others are left out, and so is the folder of clutter, which is
    none of the 256 categories.

    Args:
        limit: Number of training pictures to keep; None for all.
        side: Height and width of the network's inputs; 299 by default.
        seed: Decides which pictures are drawn.

    Raises:
        DataError: If the folder does not exist, or a class has fewer than 80 pictures.
    """
    folder = _folder("256_ObjectCategories", "a folder of pictures for each class")
    classes = [name for name in class_names({"train": folder}) if not name.endswith(CLUTTER)]
    files = files_of(folder, classes)
    parts: dict[str, list[File]] = {part: [] for part in CALTECH_SIZES}
    generator = torch.Generator().manual_seed(seed)
    for label in sorted({file.label for file in files}):
        members = [file for file in files if file.label == label]
        order = torch.randperm(len(members), generator=generator).tolist()
        needed = sum(CALTECH_SIZES.values())
        if len(order) < needed:
            raise DataError(
                f"{printable(members[0].path.parent)} has {len(order)} pictures; the split takes "
                f"{needed} of each class"
            )
        for part, size in CALTECH_SIZES.items():
            parts[part] += sorted(members[at] for at in order[:size])
            order = order[size:]
    return read_files(folder, parts, limit, side or CALTECH_SIDE)


def office31(limit: int | None = None, side: int | None = None, *, domain: str) -> Dataset[Split]:
    """Office-31's pictures of a domain, which is a folder as its authors give it.

    Args:
        limit: Training pictures to keep; None for all.
        side: Height and width of what the network gets; 224 by default.
        domain: ``amazon``, ``dslr`` or ``webcam``.

    Raises:
        DataError: If the folder is not there.
    """
    name = f"office31/{domain}"
    folder = _folder(name, "a folder of pictures for each of 31 classes, or images with these")
    own = folder / "images"
    return read_folder(own if own.is_dir() else folder, limit, side or IMAGENET_SIDE)


FOLDERS: Mapping[str, Callable[[int | None, int | None], Dataset[Split]]] = MappingProxyType(
    dict(
        zip(
            OF_FOLDERS,
            (
                imagenet,
                caltech256,
                *(partial(office31, domain=n.partition("-")[2]) for n in OFFICE),
            ),
            strict=True,
        )
    )
)
"""Data sets that are folders of pictures, by name."""
SEED = "caltech256:seed="


def open_folder(text: str, limit: int | None, side: int | None) -> Dataset[Split] | None:
    """Open a data set of ``FOLDERS``; None if the text names none.

    Args:
        text: A key of ``FOLDERS``, or ``caltech256:seed=N``.
        limit: Number of training pictures to keep; None for all.
        side: Height and width of the network's inputs; None for the data set's default.

    Raises:
        SpecError: If the data set does not take the argument in the text.
        DataError: If the data set's folder does not exist, or has too few pictures.
    """
    if text in FOLDERS:
        return FOLDERS[text](limit, side)
    name, _, argument = text.partition(":")
    if name not in FOLDERS:
        return None
    seed = text.removeprefix(SEED)
    if not text.startswith(SEED) or not seed.isdecimal() or len(seed) > MAX_DIGITS:
        takes = (
            f"seed=N with a whole number of at most {MAX_DIGITS} digits"
            if SEED.startswith(f"{name}:")
            else "no argument"
        )
        raise SpecError(f"data {name} was given {printable(argument)!r}; it takes {takes}")
    return caltech256(limit, side, seed=int(seed))


def _folder(name: str, holds: str) -> Path:
    folder = data_folder() / name
    if not folder.is_dir():
        raise DataError(
            f"{printable(folder)} does not exist; put {holds} into it, or set {FOLDER_VARIABLE} "
            f"to the folder above it"
        )
    return folder
