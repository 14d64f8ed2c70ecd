"""A user's own PyTorch data sets, given in Python or by ``FILE.py:FUNCTION``."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import TensorDataset

from normkit.errors import DataError
from normkit.lab.data.dataset import Dataset, Pictures, Split, assembled
from normkit.lab.data.files import MAX_CLASSES
from normkit.lab.data.streamed import Streamed, as_tensor
from normkit.lab.device import seeded
from normkit.lab.user_code import users_errors
from normkit.text import printable, shortened

NAMES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
NUM_FOR_FINGERPRINT = 256  # pictures that are hashed to recognise a data set
NUM_TRIED = 32  # examples whose classes are compared with the data set's list of classes
RULE = (
    'give a dict {"train": ..., "test": ...} of PyTorch data sets, maybe with "validation", or a '
    "tuple (train, test) or (train, validation, test), or one data set, which is split"
)


def read_given(
    given: object, name: str, limit: int | None = None, side: int | None = None
) -> Dataset[Split]:
    """Read a user's PyTorch data sets.

    Each has a length, and ``(picture, class)`` at each position. Byte tensors and PIL's pictures
    are scaled by the mean and standard deviation of each channel of the training pictures;
    floating-point tensors are used as they are.

    Args:
        given: ``{"train": ..., "validation": ..., "test": ...}``, a tuple of two or three data
            sets, or one data set.
        name: Name of the data sets in error messages.
        limit: Number of training examples to keep, ``None`` for all.
        side: Height and width of the network's inputs; by default those of the first picture.

    Raises:
        DataError: If ``given`` is something else, a part is empty, or a part has classes that the
            training set does not have.
    """
    parts = {part: _part(dataset, f"{name} ({part})") for part, dataset in _parts(given).items()}
    for part, source in parts.items():
        unknown = sorted(set(source.labels()) - set(parts["train"].labels()))
        if unknown:
            raise DataError(
                f"the {part} set of {name} has the classes {unknown[:5]}, which its training set "
                f"does not have; give both the same classes"
            )
    shape = _input_shape(parts["train"].picture(0), side)
    digest = hashlib.sha256()
    for part, source in parts.items():
        digest.update(f"{part} {source.targets.tolist()}".encode())
        for picture in source.sample():
            digest.update(picture.contiguous().numpy().tobytes())
    splits = {part: source.split(shape) for part, source in parts.items()}
    return assembled(name, splits, digest.hexdigest()[:12], limit)


def _parts(given: object) -> dict[str, Any]:
    """The data sets by the name of their part."""
    found: dict[str, Any] = {}
    if isinstance(given, Mapping) and set(given) <= set(NAMES):
        found = {NAMES[str(key)]: dataset for key, dataset in given.items()}
    elif isinstance(given, tuple) and len(given) in (2, 3):
        names = ("train", "test") if len(given) == 2 else ("train", "validation", "test")
        found = dict(zip(names, given, strict=True))
    elif not isinstance(given, Mapping | tuple):
        found = {"train": given}
    wrong = [
        d for d in found.values() if not hasattr(d, "__len__") or not hasattr(d, "__getitem__")
    ]
    if "train" not in found or wrong:
        shown = type(wrong[0]).__name__ if wrong else printable(shortened(repr(given)))
        raise DataError(f"data sets were given as {shown}; {RULE}")
    return found


@dataclass(frozen=True, slots=True)
class _Source:
    """A PyTorch data set, with the classes of its examples."""

    dataset: Any
    targets: Int[Tensor, " n"]
    name: str

    def labels(self) -> list[int]:
        return self.targets.unique().tolist()

    def picture(self, at: int) -> Shaped[Tensor, "c h w"]:
        return as_tensor(self.dataset[at][0], f"example {at} of {self.name}")

    def sample(self) -> Iterator[Shaped[Tensor, "..."]]:
        """The tensors that the fingerprint hashes: all of a TensorDataset, else some pictures."""
        if isinstance(self.dataset, TensorDataset):
            yield from self.dataset.tensors
            return
        for at in _spread(len(self.targets), NUM_FOR_FINGERPRINT):
            with seeded(0):  # so that random augmentation gives the same picture each time
                yield self.picture(at)

    def split(self, shape: tuple[int, int, int]) -> Pictures | Streamed:
        if isinstance(self.dataset, TensorDataset):
            values = self.dataset.tensors[0]
            if values.shape[1:] == shape:
                return Pictures(values=values, targets=self.targets)
        return Streamed(
            read=self.picture,
            positions=torch.arange(len(self.targets)),
            targets=self.targets,
            input_shape=shape,
        )


def _part(dataset: Any, name: str) -> _Source:
    """Find the classes by the attribute that most data sets have, else by reading each example."""
    if len(dataset) == 0:
        raise DataError(f"{name} has no examples; give one or more")
    with users_errors(name), seeded(0):
        first = dataset[0]
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise DataError(
            f"{name} gave a {type(first).__name__} at position 0; it gives (picture, class)"
        )
    known = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(dataset, TensorDataset):
        known = dataset.tensors[1]
    if (
        known is None
        or len(known) != len(dataset)
        or (not isinstance(dataset, TensorDataset) and _differs(dataset, known, name))
    ):
        with users_errors(name):
            known = [dataset[at][1] for at in range(len(dataset))]
    try:
        targets = torch.as_tensor([int(label) for label in known])
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} has classes that are not whole numbers: {error}") from error
    if int(targets.min()) < 0 or int(targets.max()) >= MAX_CLASSES:
        raise DataError(
            f"{name} has classes from {int(targets.min())} to {int(targets.max())}; they are "
            f"counted from 0"
        )
    return _Source(dataset, targets, name)


def _differs(dataset: Any, known: Any, name: str) -> bool:
    """Whether examples have other classes than the list says, for example by a transform."""
    with users_errors(name), seeded(0):
        return any(int(dataset[at][1]) != int(known[at]) for at in _spread(len(dataset), NUM_TRIED))


def _spread(number: int, at_most: int) -> list[int]:
    """At most ``at_most`` evenly spread positions."""
    kept = min(number, at_most)
    return [number * at // kept for at in range(kept)]


def _input_shape(first: Shaped[Tensor, "c h w"], side: int | None) -> tuple[int, int, int]:
    channels, height, width = first.shape
    return (channels, height, width) if side is None else (channels, side, side)
