"""Classes that a network learns, and others that it has never seen, to draw episodes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from normkit.errors import DataError, SpecError
from normkit.lab.data import Dataset, Split, stratified_order
from normkit.lab.data.dataset import SPLIT_SEED, VALIDATION_SHARE, hold_out
from normkit.lab.data.folder import (
    File,
    class_folders,
    files_of,
    part_folders,
    read_files,
)
from normkit.text import listed, printable

FEWEST = 2  # classes that a network tells apart


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSplit:
    """Which classes a network learns, and which ones it is judged on.

    Args:
        base: Classes that it learns.
        validation: Unseen ones to choose settings by; may be none.
        novel: Unseen ones for the test.
    """

    base: tuple[int, ...]
    validation: tuple[int, ...]
    novel: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """Pictures to draw episodes from, of one split or several."""

    parts: Sequence[Split]

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """Class of each picture."""
        return torch.cat([part.targets for part in self.parts])

    def inputs(self, positions: Int[Tensor, " k"]) -> Float[Tensor, "k c h w"]:
        """Pictures at these positions, in this order."""
        found, places, start = list[Tensor](), list[Tensor](), 0
        for part in self.parts:
            of_part = ((positions >= start) & (positions < start + len(part))).nonzero().flatten()
            found.append(part.take(positions[of_part] - start).inputs)
            places.append(of_part)
            start += len(part)
        return torch.cat(found)[torch.cat(places).argsort()]


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShotData(Dataset[Split]):
    """A data set of the base classes, and pictures of others to draw episodes from.

    Args:
        pools: Those of ``validation`` and of ``test``.
        fewest: Pictures of the class that has fewest, in each pool.
    """

    pools: Mapping[str, Pool]

    def fewest(self, held: str) -> int:
        """Pictures of the class that has fewest in a pool."""
        return int(self.pools[held].targets.bincount().min())


def chosen_classes(dataset: Dataset[Split], novel: int, validation: int, seed: int) -> ClassSplit:
    """Draw novel and validation classes; the others are base classes.

    Raises:
        SpecError: If too few are left to learn.
    """
    number = dataset.num_classes
    if novel + validation + FEWEST > number:
        raise SpecError(
            f"few-shot:novel={novel}:validation={validation} leaves "
            f"{max(number - novel - validation, 0)} of the {number} classes of {dataset.name} to "
            f"learn; leave {FEWEST} or more"
        )
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = order[:novel], order[novel : novel + validation], order[novel + validation :]
    new, held, base = (tuple(sorted(part)) for part in parts)
    return ClassSplit(base=base, validation=held, novel=new)


def divided(
    dataset: Dataset[Split],
    classes: ClassSplit,
    *,
    per_class: int,
    num_needed: int,
    limit: int | None = None,
) -> FewShotData:
    """Keep base classes for training, and pictures of the others for episodes.

    Pictures are scaled by those that are trained on, so nothing is known of the other classes.

    Args:
        dataset: All classes.
        classes: Which are which.
        per_class: Pictures of a class in a pool, at most; test pictures are taken first.
        num_needed: Pictures of a class that validation episodes need. Without validation classes
            they are drawn from held-out pictures of the base classes; if these are too few, then
            from pictures that are trained on as well.
        limit: Training pictures to keep; None for all.
    """
    train = _of(dataset.train.scaled(None), classes.base)
    if limit is not None:
        train = train.keep(stratified_order(train.targets, SPLIT_SEED)[:limit])
    scaling = train.own_scaling()
    splits = {
        name: split.scaled(scaling)
        for name, split in (
            ("train", dataset.train),
            ("validation", dataset.validation),
            ("test", dataset.test),
        )
    }
    train = train.scaled(scaling)
    validation, test = (_of(splits[part], classes.base) for part in ("validation", "test"))
    everywhere = [splits[part] for part in ("test", "validation", "train")]
    novel = _pool([_of(split, classes.novel) for split in everywhere], per_class)
    notes = dataset.notes
    if classes.validation:
        held = _pool([_of(split, classes.validation) for split in everywhere], per_class)
    else:
        held = _pool([validation], per_class)
        number = int(validation.targets.bincount(minlength=len(classes.base)).min())
        if number < num_needed:
            held = _pool([validation, train], per_class)
            trained_on_too = (
                f"validation episodes are drawn from pictures that are trained on, too: of the "
                f"base classes only {number} of a class are held out; few-shot:validation=N keeps "
                f"classes for them"
            )
            notes += (trained_on_too,)
    return FewShotData(
        name=dataset.name,
        num_classes=len(classes.base),
        train=train,
        validation=validation,
        test=test if len(test) else validation,
        fingerprint=dataset.fingerprint,
        notes=notes,
        pools={"validation": held, "test": novel},
    )


def _of(split: Split, classes: Sequence[int]) -> Split:
    """The pictures of some classes, which are counted anew from 0."""
    numbers = torch.full((1 + max([*classes, *split.targets.tolist()]),), -1)
    numbers[list(classes)] = torch.arange(len(classes))
    kept = split.keep((numbers[split.targets] >= 0).nonzero().flatten())
    return replace(kept, targets=numbers[kept.targets])  # type: ignore[type-var]


def _pool(splits: Sequence[Split], per_class: int) -> Pool:
    """At most so many pictures of each class, of the first splits that have them."""
    parts, counts = list[Split](), dict[int, int]()
    for split in splits:
        if not len(split):
            continue
        kept: list[Tensor] = []
        order = stratified_order(split.targets, SPLIT_SEED)
        for label in split.targets.unique().tolist():
            members = order[split.targets[order] == label][: per_class - counts.get(label, 0)]
            counts[label] = counts.get(label, 0) + len(members)
            kept.append(members)
        index = torch.cat(kept)
        if len(index):
            parts.append(split.keep(index.sort().values))
    return Pool(tuple(parts))


def split_of_folders(folder: Path) -> ClassSplit | None:
    """The classes of a folder whose parts have different ones, as few-shot data sets come.

    ``train`` has folders of the base classes, ``test`` of novel ones, and ``val``, where there is
    one, those of validation. They are counted in this order: train, val, test.

    Returns:
        Which are which; None if the folder has no such parts, or their classes are the same.

    Raises:
        DataError: If some classes are in several parts and others are not.
    """
    roots = part_folders(folder) if folder.is_dir() else {}
    named = {part: class_folders(root) for part, root in roots.items()}
    if not {"train", "test"} <= named.keys() or len({*map(tuple, named.values())}) == 1:
        return None
    every = [name for names in named.values() for name in names]
    shared = sorted({name for name in every if every.count(name) > 1})
    if shared:
        raise DataError(
            f"in {printable(folder)}, {listed(shared)} "
            f"{'is' if len(shared) == 1 else 'are'} in several of "
            f"{listed(root.name for root in roots.values())}, and others are not; give all parts "
            f"the same classes, which are then split by seed, or each part classes of its own"
        )
    numbers = {name: at for at, name in enumerate(every)}
    base, validation, novel = (
        tuple(numbers[name] for name in named.get(part, ()))
        for part in ("train", "validation", "test")
    )
    return ClassSplit(base=base, validation=validation, novel=novel)


def read_class_folders(folder: Path, side: int | None) -> Dataset[Split]:
    """Read a folder whose parts have different classes; a tenth of ``train`` is held out.

    Test pictures are those of ``val`` and ``test``.

    Raises:
        DataError: If pictures are missing.
    """
    files: dict[str, list[File]] = {}
    start = 0
    for part, root in part_folders(folder).items():
        names = class_folders(root)
        own = files_of(root, names)
        files[part] = [File(file.path, file.label + start) for file in own]
        start += len(names)
    rest, held = hold_out(torch.tensor([f.label for f in files["train"]]), VALIDATION_SHARE)
    parts = {
        "train": [files["train"][at] for at in rest.tolist()],
        "validation": [files["train"][at] for at in held.tolist()],
        "test": files.get("validation", []) + files["test"],
    }
    return read_files(folder, parts, None, side)
