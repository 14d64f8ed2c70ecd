"""Two domains with the same classes, of which the second one's labels are never trained on."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from normkit.errors import DataError
from normkit.lab.data import Dataset, Examples, Split, open_data
from normkit.lab.data.folder import PREFIX, class_names, training_folders
from normkit.lab.data.known import data_text
from normkit.lab.data.shifts import SHIFTS, shifted
from normkit.lab.loading import Loading, loaded_batches
from normkit.lab.spec import Protocol
from normkit.text import listed, printable


@dataclass(frozen=True, slots=True)
class Domains:
    """A labelled source and a target.

    Args:
        source: Training examples with labels, validation and test examples.
        target: Likewise; labels of its training examples are not used.
    """

    source: Dataset[Split]
    target: Dataset[Split]

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.source.name} to {self.target.name}"

    @property
    def fingerprint(self) -> str:
        """Of both."""
        both = f"{self.source.fingerprint} {self.target.fingerprint}"
        return hashlib.sha256(both.encode()).hexdigest()[:12]

    @property
    def notes(self) -> tuple[str, ...]:
        """Of both."""
        return tuple(dict.fromkeys([*self.source.notes, *self.target.notes]))

    @property
    def num_examples(self) -> int:
        """Labelled training examples."""
        return len(self.source.train)

    @property
    def num_classes(self) -> int:
        """Classes, the same ones in both."""
        return self.source.num_classes

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        return self.source.input_shape


def open_domains(protocol: Protocol, target: str, *, whole: bool) -> Domains:
    """Open both domains.

    Args:
        protocol: Says the source.
        target: A shift of the source's pictures, or other data. A shift takes every second training
            picture of the source, so that no picture is in both domains.
        whole: Whether all pictures of a domain are trained on, and all of the target judged.

    Raises:
        NormError: If one of them cannot be read, or their pictures or classes differ.
    """
    hold_out = protocol.hold_out or whole
    options = (protocol.limit, protocol.image_size, hold_out)
    if set(target.split("+")) <= set(SHIFTS):
        found = _with_shift(open_data(protocol.data, *options), target)
    else:
        text = data_text(target)
        _check_class_names(protocol.data, text)
        found = Domains(open_data(protocol.data, *options), open_data(text, *options))
    found = Domains(every_picture(found.source), every_picture(found.target)) if whole else found
    _check_alike(found)
    return _scaled_alike(found)


def _with_shift(source: Dataset[Split], names: str) -> Domains:
    positions = torch.arange(len(source.train))
    values = getattr(source.train, "values", torch.empty(0))
    options: Any = {"names": names, "top": int(values.max()) if values.numel() else 255}
    target = Dataset(
        name=f"{source.name} {names}",
        num_classes=source.num_classes,
        train=shifted(source.train.keep(positions[1::2]), **options),
        validation=shifted(source.validation, **options),
        test=shifted(source.test, **options),
        fingerprint=f"{source.fingerprint} {names}",
    )
    return Domains(replace(source, train=source.train.keep(positions[::2])), target)


def every_picture(dataset: Dataset[Split]) -> Dataset[Split]:
    """The data set whose parts all have all of its pictures."""
    every = dataset.train.joined(dataset.validation).joined(dataset.test)
    return replace(dataset, train=every, validation=every, test=every)


def _check_class_names(source: str, target: str) -> None:
    """Refuse folders whose classes have other names."""
    if not (source.startswith(PREFIX) and target.startswith(PREFIX)):
        return
    folders = [Path(text.removeprefix(PREFIX)) for text in (source, target)]
    names = [set(class_names(training_folders(folder))) for folder in folders]
    if names[0] != names[1]:
        only = [sorted(names[0] - names[1]), sorted(names[1] - names[0])]
        said = [
            f"{listed(classes)} only in {printable(folder)}"
            for classes, folder in zip(only, folders, strict=True)
            if classes
        ]
        raise DataError(
            f"the classes of the two domains differ: {' and '.join(said)}; give both the same "
            f"class folders"
        )


def _check_alike(found: Domains) -> None:
    source, target = found.source, found.target
    if source.num_classes != target.num_classes:
        raise DataError(
            f"the source {source.name} has {source.num_classes} classes and the target "
            f"{target.name} has {target.num_classes}; give two domains with the same classes"
        )
    if source.input_shape != target.input_shape:
        raise DataError(
            f"pictures of the source {source.name} have shape {source.input_shape} and those of "
            f"the target {target.name} {target.input_shape}; give --image-size, and pictures in "
            f"colour, or grey ones, in both"
        )


def _scaled_alike(found: Domains) -> Domains:
    """Scale the target as the source, so that the network sees how they differ."""
    scaling = getattr(found.source.train, "scaling", None)
    if scaling is None:
        return found
    target = found.target
    parts = {n: getattr(target, n).scaled(scaling) for n in ("train", "validation", "test")}
    return replace(found, target=replace(target, **parts))


class Aligned(NamedTuple):
    """Examples of some classes, as many of each: class by class, in the same order."""

    source: Examples
    target: Examples
    num_classes: int

    def by_class(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "m k d"]:
        """Rows of values of these examples, class by class."""
        return values.float().unflatten(0, (self.num_classes, -1))


@dataclass(frozen=True, slots=True)
class DomainBatch:
    """What a step gets.

    Args:
        labelled: Source examples.
        aligned: Examples of both domains of the same classes; None before there are clusters.
    """

    labelled: Examples
    aligned: Aligned | None = None

    def __len__(self) -> int:
        return len(self.labelled)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        aligned = self.aligned and self.aligned._replace(
            source=self.aligned.source.to(device), target=self.aligned.target.to(device)
        )
        return replace(self, labelled=self.labelled.to(device), aligned=aligned)


@dataclass(slots=True)
class ClassAware:
    """Source examples, and with each batch as many examples of some classes from both domains.

    Args:
        source: Labelled examples.
        target: Examples without labels.
        per_class: Examples of a class in a batch, of each domain.
        members: Positions in the target of the examples that are taken for each class; None for
            batches without such examples.
    """

    source: Split
    target: Split
    per_class: int
    members: Mapping[int, Int[Tensor, " k"]] | None = None
    _of_source: Mapping[int, Int[Tensor, " k"]] = field(init=False)

    def __post_init__(self) -> None:
        labels = self.source.targets
        self._of_source = {
            int(label): (labels == label).nonzero()[:, 0] for label in labels.unique()
        }

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Int[Tensor, " k"]) -> DomainBatch:
        """A batch as large as those of a step, whatever the members are."""
        labels = torch.arange(len(self.target)) % max(2, len(index) // self.per_class)
        guessed = {int(label): (labels == label).nonzero()[:, 0] for label in labels.unique()}
        members = {label: at for label, at in guessed.items() if label in self._of_source}
        given = None if self.members is None else self.members or members
        return next(self._batches([index], Loading(), given))

    def batches(
        self, parts: Sequence[Int[Tensor, " b"]], loading: Loading
    ) -> Iterator[DomainBatch]:
        """The batches with these source examples; the others are drawn from the loading's seed."""
        return self._batches(parts, loading, self.members)

    def _batches(
        self,
        parts: Sequence[Int[Tensor, " b"]],
        loading: Loading,
        members: Mapping[int, Int[Tensor, " k"]] | None,
    ) -> Iterator[DomainBatch]:
        labelled = loaded_batches(self.source, parts, loading)
        if not members:
            yield from map(DomainBatch, labelled)
            return
        drawn = [self._draw(part, loading.seed, members) for part in parts]
        sources = loaded_batches(self.source, [source for source, _, _ in drawn], loading)
        targets = loaded_batches(self.target, [target for _, target, _ in drawn], loading)
        for batch, (_, _, num_classes) in zip(labelled, drawn, strict=True):
            yield DomainBatch(batch, Aligned(next(sources), next(targets), num_classes))

    def _draw(
        self, part: Int[Tensor, " b"], seed: int, members: Mapping[int, Int[Tensor, " k"]]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], int]:
        """Positions of examples of some classes, in both domains, and how many classes."""
        first = int(part[0]) if len(part) else 0  # differs in each batch of an epoch
        generator = torch.Generator().manual_seed((seed * 1_000_003 + first) % 2**63)
        classes = sorted(set(members) & set(self._of_source))
        num_classes = min(max(1, len(part) // self.per_class), len(classes))
        order = torch.randperm(len(classes), generator=generator)[:num_classes].tolist()
        chosen = [classes[at] for at in order]

        def some(of: Int[Tensor, " k"]) -> Int[Tensor, " n"]:
            """So many of these, each as often as it must be."""
            rounds = -(-self.per_class // len(of))
            orders = [torch.randperm(len(of), generator=generator) for _ in range(rounds)]
            return of[torch.cat(orders)[: self.per_class]]

        source = torch.cat([some(self._of_source[label]) for label in chosen])
        return source, torch.cat([some(members[label]) for label in chosen]), num_classes
