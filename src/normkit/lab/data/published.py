"""Data sets with the splits of the papers; those in folders are streamed where they must be."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from normkit.errors import DataError, SpecError
from normkit.lab.data.dataset import (
    SPLIT_SEED,
    Dataset,
    Pictures,
    Split,
    assembled,
    hold_out,
)
from normkit.lab.data.folder import DEFAULT_SIDE, read_classes, read_folder
from normkit.lab.data.sources import (
    FOLDER_VARIABLE,
    FOLDERS,
    Source,
    data_folder,
    from_torchvision,
    parts_of,
    reader,
)
from normkit.text import printable

CALTECH_SPLIT = {"train": 40, "validation": 10, "test": 30}
"""Pictures of each of the 256 categories: Summers & Dinneen, section 4.1."""
CLUTTER = "257.clutter"
VALIDATION_FIFTH = 0.2


@reader("mnist")
def mnist() -> Source:
    """70000 grey 28x28 digits."""
    return from_torchvision("MNIST")


@reader("cifar100-40k")
def cifar100_for_tuning() -> Source:
    """CIFAR-100 with 40000 training and 10000 validation pictures: Summers & Dinneen, 4.1."""
    return _with_validation(from_torchvision("CIFAR100"))


@reader("svhn-extra")
def svhn_with_extra() -> Source:
    """SVHN's 604388 training and extra pictures, 80 and 20 %: Summers & Dinneen, 4.1."""
    train, extra, test = parts_of("SVHN", *({"split": part} for part in ("train", "extra", "test")))
    every = Pictures(
        values=torch.cat([train.values, extra.values]),
        targets=torch.cat([train.targets, extra.targets]),
    )
    return _with_validation(Source(every, test))


def _with_validation(source: Source) -> Source:
    """Hold a fifth of the training pictures out, stratified, the same ones each time."""
    kept, held = hold_out(source.pictures.targets, VALIDATION_FIFTH)
    pictures = source.pictures
    return Source(pictures.keep(kept), source.test, pictures.keep(held))


def imagenet(limit: int | None = None, side: int | None = None) -> Dataset[Split]:
    """ImageNet from the folders ``train`` and ``val`` of ``imagenet`` in the data folder.

    All training pictures train. The 50000 of ``val`` are validation and test in one: the test
    labels are not public, and the papers report on these.

    Args:
        limit: Training pictures to keep, ``None`` for all.
        side: Height and width of what a network gets; 224 by default.

    Raises:
        DataError: If it is not there, with where to put it.
    """
    folder = data_folder() / "imagenet"
    if not all((folder / part).is_dir() for part in ("train", "val")):
        raise DataError(
            f"ImageNet is not in {printable(folder)}; download ILSVRC2012 from image-net.org, put "
            f"its folders train and val there, with a folder for each of the 1000 classes in both "
            f"(or a link to them), or set {FOLDER_VARIABLE} to the folder that holds imagenet"
        )
    return read_folder(folder, limit, side or DEFAULT_SIDE, holds_out=False)


def caltech256(
    limit: int | None = None, side: int | None = None, *, seed: int = SPLIT_SEED
) -> Dataset[Split]:
    """Caltech-256 with 40 training, 10 validation and 30 test pictures of each of 256 categories.

    Args:
        limit: Training pictures to keep, ``None`` for all.
        side: Height and width of what a network gets; 224 by default.
        seed: Decides which pictures of a category go where.

    Raises:
        DataError: If it is not there, with where to put it.
    """
    folder = data_folder() / "caltech256" / "256_ObjectCategories"
    if not folder.is_dir():
        raise DataError(
            f"Caltech-256 is not in {printable(folder)}; download 256_ObjectCategories.tar from "
            f"data.caltech.edu/records/nyy15-4j048 and unpack it there, or set {FOLDER_VARIABLE} "
            f"to the folder that holds caltech256"
        )
    every, fingerprint, notes = read_classes(folder, side or DEFAULT_SIDE, leave_out=(CLUTTER,))
    places = split_by_class(every.targets, list(CALTECH_SPLIT.values()), seed, folder)
    parts = {part: every.keep(at) for part, at in zip(CALTECH_SPLIT, places, strict=True)}
    name = f"caltech256:seed={seed}"
    return assembled(name, parts, f"{fingerprint}-{seed}", limit, notes)


def split_by_class(
    targets: Int[Tensor, " n"], counts: Sequence[int], seed: int, where: Path
) -> list[Int[Tensor, " k"]]:
    """Positions of so many random examples of each class for each part, none in two parts.

    Raises:
        DataError: If a class has too few.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in counts]
    for label in targets.unique():
        members = (targets == label).nonzero()[:, 0]
        if len(members) < sum(counts):
            raise DataError(
                f"class {int(label)} of {printable(where)} has {len(members)} pictures that can be "
                f"read; the split takes {' + '.join(map(str, counts))} of each class"
            )
        drawn = members[torch.randperm(len(members), generator=generator)]
        for part, chosen in zip(parts, drawn[: sum(counts)].split(list(counts)), strict=True):
            part.append(chosen)
    return [torch.cat(part).sort().values for part in parts]


FOLDERS.update({"imagenet": imagenet, "caltech256": caltech256})


def opened(text: str, limit: int | None, side: int | None) -> Dataset[Split] | None:
    """Open a data set of this module that is in a folder; None if the text names none.

    Raises:
        SpecError: If it has an argument that it does not take.
        DataError: If it is not there.
    """
    name, _, argument = text.partition(":")
    if name not in FOLDERS:
        return None
    if not argument:
        return FOLDERS[name](limit, side)
    key, _, value = argument.partition("=")
    if name != "caltech256" or key != "seed" or not value.isdecimal() or len(value) > 9:
        takes = "seed=N, a whole number" if name == "caltech256" else "no argument"
        raise SpecError(
            f"data {printable(text)!r} has the argument {printable(argument)!r}; {name} takes "
            f"{takes}"
        )
    return caltech256(limit, side, seed=int(value))
