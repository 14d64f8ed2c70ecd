"""A data set: three splits of pictures, and the tensors that a network gets from them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

SPLIT_SEED = 0  # fixed, because splits belong to the data set and not to a run
TEST_SHARE = 0.2  # held out from data sets without a test split
VALIDATION_SHARE = 0.1  # held out from the training examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Inputs in the form that a network takes, and their classes."""

    inputs: Float[Tensor, "n c h w"]
    targets: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Int[Tensor, " k"]) -> "Examples":
        """Examples at these positions, in this order."""
        return Examples(inputs=self.inputs[index], targets=self.targets[index])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        channels, height, width = self.inputs.shape[1:]
        return channels, height, width

    def keep(self, index: Int[Tensor, " k"]) -> Self:
        """A split of these examples only."""
        return replace(self, inputs=self.inputs[index], targets=self.targets[index])

    def joined(self, other: Self) -> Self:
        """These examples and then the others."""
        return replace(
            self,
            inputs=torch.cat([self.inputs, other.inputs]),
            targets=torch.cat([self.targets, other.targets]),
        )

    def own_scaling(self) -> "Scaling | None":
        """None, because the inputs are scaled already."""
        return None

    def scaled(self, scaling: "Scaling | None") -> Self:
        """The same examples, because the inputs are scaled already."""
        return self

    def to(self, device: torch.device) -> "Examples":
        """The same examples on a device."""
        return Examples(inputs=self.inputs.to(device), targets=self.targets.to(device))


@dataclass(frozen=True, slots=True)
class Scaling:
    r"""Scales a picture's values :math:`v` to :math:`(v - \text{mean}_c) / \text{std}_c`."""

    mean: Float[Tensor, "1 c 1 1"]
    std: Float[Tensor, "1 c 1 1"]

    @classmethod
    def of(cls, pictures: Shaped[Tensor, "n c h w"]) -> "Scaling":
        """Mean and standard deviation of each channel; a constant channel is only centred."""
        std, mean = torch.std_mean(pictures.float(), (0, 2, 3), correction=0, keepdim=True)
        return cls(mean, torch.where(std > 0, std, torch.ones_like(std)))

    def __call__(self, pictures: Shaped[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Scale a batch on its device."""
        device = pictures.device
        return (pictures.float() - self.mean.to(device)) / self.std.to(device)


class Split(Protocol):
    """Training, validation or test examples, with pictures in memory or in files."""

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """Class of each example, on the CPU."""
        ...

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        ...

    def __len__(self) -> int: ...

    def take(self, index: Int[Tensor, " k"]) -> Examples:
        """Examples at these positions, in this order, without augmentation."""
        ...

    def keep(self, index: Int[Tensor, " k"]) -> Self:
        """A split of these examples only."""
        ...

    def joined(self, other: Self) -> Self:
        """These examples, then the others, which must come from the same source."""
        ...

    def own_scaling(self) -> "Scaling | None":
        """Scaling of these pictures to mean 0 and standard deviation 1; None if they need none."""
        ...

    def scaled(self, scaling: "Scaling | None") -> Self:
        """The same examples, which ``take`` then scales in this way."""
        ...


S_co = TypeVar("S_co", bound=Split, covariant=True)
P = TypeVar("P", bound=Split)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """A split in memory with one byte per value; ``take`` scales the pictures."""

    values: Shaped[Tensor, "n c h w"]
    targets: Int[Tensor, " n"]
    scaling: Scaling | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        channels, height, width = self.values.shape[1:]
        return channels, height, width

    def take(self, index: Int[Tensor, " k"]) -> Examples:
        """Examples at these positions, in this order, without augmentation."""
        values = self.values[index]
        inputs = values.float() if self.scaling is None else self.scaling(values)
        return Examples(inputs=inputs, targets=self.targets[index])

    def keep(self, index: Int[Tensor, " k"]) -> Self:
        """A split of these examples only."""
        return replace(self, values=self.values[index], targets=self.targets[index])

    def joined(self, other: Self) -> Self:
        """These examples and then the others."""
        return replace(
            self,
            values=torch.cat([self.values, other.values]),
            targets=torch.cat([self.targets, other.targets]),
        )

    def to(self, device: torch.device) -> Self:
        """The same examples on a device."""
        return replace(self, values=self.values.to(device), targets=self.targets.to(device))

    def picture(self, at: int) -> Shaped[Tensor, "c h w"]:
        """The picture of an example, as it was read."""
        return self.values[at]

    def own_scaling(self) -> Scaling | None:
        """Scaling by all pictures; None for floating-point pictures, which are not scaled."""
        return None if self.values.is_floating_point() else Scaling.of(self.values)

    def scaled(self, scaling: Scaling | None) -> Self:
        """The same examples, which ``take`` then scales in this way."""
        return replace(self, scaling=scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset(Generic[S_co]):
    """Three disjoint splits, scaled by the training pictures' statistics.

    The fingerprint is a hash of all examples as they were read, so it changes if the files change.
    """

    name: str
    num_classes: int
    train: S_co
    validation: S_co
    test: S_co
    fingerprint: str = ""
    notes: tuple[str, ...] = ()  # notes for the user, for example about pictures that are left out

    @property
    def num_examples(self) -> int:
        """Training examples."""
        return len(self.train)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        return self.train.input_shape


def loaded(dataset: "Dataset[Split]") -> "Dataset[Examples]":
    """Load all scaled inputs into memory."""
    parts = (dataset.train, dataset.validation, dataset.test)
    train, validation, test = (part.take(torch.arange(len(part))) for part in parts)
    return Dataset(
        name=dataset.name,
        num_classes=dataset.num_classes,
        train=train,
        validation=validation,
        test=test,
        fingerprint=dataset.fingerprint,
        notes=dataset.notes,
    )


def stratified_order(targets: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """Random order in which every prefix has the classes in their proportions.

    The ``r``-th example of a class with ``k`` examples stands at ``(r + 1/2) / k``.

    Args:
        targets: Class of each example.
        seed: Decides which examples of a class come first.

    Returns:
        A permutation of ``range(n)``.
    """
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    position = torch.empty(len(targets), dtype=torch.float64)
    for label in targets.unique():
        members = shuffled[targets[shuffled] == label]
        ranks = torch.arange(len(members), dtype=torch.float64)
        position[members] = (ranks + 0.5) / len(members)
    return shuffled[position[shuffled].argsort(stable=True)]


def hold_out(targets: Int[Tensor, " n"], share: float) -> tuple[Tensor, Tensor]:
    """Hold out a stratified share of examples, the same ones each time.

    Returns:
        Positions of the other examples, then of those that are held out.
    """
    order = stratified_order(targets, SPLIT_SEED)
    num_held = round(share * len(targets))
    return order[num_held:], order[:num_held]


def limited(train: P, validation: P, limit: int | None) -> tuple[P, P]:
    """Keep ``limit`` training examples, and the same share of the validation examples."""
    if limit is None or limit >= len(train):
        return train, validation
    num_validation = max(1, round(limit * len(validation) / len(train)))
    return (
        train.keep(torch.arange(limit)),
        validation.keep(torch.arange(min(num_validation, len(validation)))),
    )


def assembled(
    name: str,
    given: Mapping[str, P],
    fingerprint: str,
    limit: int | None = None,
    notes: tuple[str, ...] = (),
) -> Dataset[P]:
    """Hold out missing splits, limit the number of examples, and scale.

    Args:
        name: Name of the data set.
        given: The splits. If there is no ``test``, a fifth of ``train`` is held out for it; if
            there is no ``validation``, a tenth of the rest. Both are stratified and the same each
            time.
        fingerprint: Hash of everything that was read.
        limit: Number of training examples to keep, ``None`` for all; the same share of the
            validation examples is kept.
        notes: Notes for the user.
    """
    parts = dict(given)
    num_classes = 1 + int(max(part.targets.max() for part in parts.values()))
    for part, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if part not in parts:
            rest, held = hold_out(parts["train"].targets, share)
            parts |= {part: parts["train"].keep(held), "train": parts["train"].keep(rest)}
    if limit is not None and "validation" in given:  # otherwise holding out has shuffled them
        for part in ("train", "validation"):
            order = stratified_order(parts[part].targets, SPLIT_SEED)
            parts[part] = parts[part].keep(order)
    train, validation = limited(parts["train"], parts["validation"], limit)
    scaling = train.own_scaling()
    return Dataset(
        name=name,
        num_classes=num_classes,
        train=train.scaled(scaling),
        validation=validation.scaled(scaling),
        test=parts["test"].scaled(scaling),
        fingerprint=fingerprint,
        notes=notes,
    )


def fingerprint_of(parts: Sequence[Pictures]) -> str:
    """Hash pictures, their order and their splits into twelve hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in (tensor for part in parts for tensor in (part.values, part.targets)):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:12]
