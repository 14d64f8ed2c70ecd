"""A data set in memory, and how it is split."""

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

SPLIT_SEED = 0  # splits belong to the data set, not to a run
TEST_SHARE = 0.2  # of data sets that come without a test split
VALIDATION_SHARE = 0.1  # of the training examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Inputs and their classes."""

    inputs: Float[Tensor, "n c h w"]
    targets: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Int[Tensor, " k"]) -> "Examples":
        """Examples at these positions, in this order."""
        return Examples(inputs=self.inputs[index], targets=self.targets[index])

    def to(self, device: torch.device) -> "Examples":
        """The same examples on a device."""
        return Examples(inputs=self.inputs.to(device), targets=self.targets.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Three disjoint sets of examples, normalised by the training set's statistics.

    The fingerprint is of all examples as they were read: it changes when the files do.
    """

    name: str
    num_classes: int
    train: Examples
    validation: Examples
    test: Examples
    fingerprint: str = ""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        channels, height, width = self.train.inputs.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "Dataset":
        """The same data set on a device."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


def stratified_order(targets: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """Random order whose every prefix holds the classes in their proportions.

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


def hold_out(examples: Examples, num_held: int) -> tuple[Examples, Examples]:
    """Split into the rest and ``num_held`` stratified examples, the same ones each time.

    Returns:
        The rest, then the held-out examples.
    """
    order = stratified_order(examples.targets, SPLIT_SEED)
    return examples.take(order[num_held:]), examples.take(order[:num_held])


def split(name: str, examples: Examples, test: Examples | None, limit: int | None) -> Dataset:
    """Cut a data set into training, validation and test examples and normalise them.

    Args:
        name: Name of the data set.
        examples: Everything but the test split, or everything.
        test: The data set's own test split; ``None`` holds a fifth of ``examples`` out.
        limit: Training examples to keep, ``None`` for all; validation shrinks with them.
    """
    num_classes = int(examples.targets.max()) + 1
    fingerprint = fingerprint_of(examples, *([] if test is None else [test]))
    if test is None:
        examples, test = hold_out(examples, round(TEST_SHARE * len(examples)))
    train, validation = hold_out(examples, round(VALIDATION_SHARE * len(examples)))
    if limit is not None and limit < len(train):
        num_validation = max(1, round(limit * len(validation) / len(train)))
        train = train.take(torch.arange(limit))
        validation = validation.take(torch.arange(min(num_validation, len(validation))))
    return _normalised(
        Dataset(
            name=name,
            num_classes=num_classes,
            train=train,
            validation=validation,
            test=test,
            fingerprint=fingerprint,
        )
    )


def fingerprint_of(*parts: Examples) -> str:
    """Twelve hexadecimal digits over examples, their order and their parts."""
    digest = hashlib.sha256()
    for tensor in (tensor for part in parts for tensor in (part.inputs, part.targets)):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:12]


def _normalised(dataset: Dataset) -> Dataset:
    """Zero mean and unit standard deviation in each channel of the training inputs."""
    std, mean = torch.std_mean(dataset.train.inputs, (0, 2, 3), correction=0, keepdim=True)
    std = torch.where(std > 0, std, torch.ones_like(std))

    def normalised(examples: Examples) -> Examples:
        return replace(examples, inputs=(examples.inputs - mean) / std)

    return replace(
        dataset,
        train=normalised(dataset.train),
        validation=normalised(dataset.validation),
        test=normalised(dataset.test),
    )
