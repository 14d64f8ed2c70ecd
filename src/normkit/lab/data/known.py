"""Data sets that papers name: their sizes, where their files are, and random pictures like them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Int
from torch import Tensor

from normkit.errors import SpecError
from normkit.lab.data.dataset import VALIDATION_SHARE, Dataset, Examples, Scaling
from normkit.lab.data.folder import PREFIX
from normkit.lab.data.sources import OF_FOLDERS, READERS, data_folder
from normkit.lab.user_code import absolute, is_reference

DOWNLOADED = "torchvision's files, which the first run downloads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A data set that papers name.

    Args:
        num_train: Training pictures.
        num_test: Test pictures.
        num_classes: Classes.
        input_shape: Of a picture as the network gets it.
        path: Where its files are in the folder of data, ``NORMKIT_DATA``.
        holds: What is there.
        validation_share: Share of the training pictures that is held out for validation.
    """

    num_train: int
    num_test: int
    num_classes: int
    input_shape: tuple[int, int, int]
    path: str
    holds: str = DOWNLOADED
    validation_share: float = VALIDATION_SHARE

    def missing(self) -> str | None:
        """Where to put the files; None if they are there."""
        place = data_folder() / self.path
        return None if place.exists() else f"{place} is not there: {self.holds}"


SMALL, GREY, LARGE = (3, 32, 32), (1, 28, 28), (3, 224, 224)


def _known(
    sizes: tuple[int, int, int],
    shape: tuple[int, int, int],
    path: str,
    holds: str = DOWNLOADED,
    validation_share: float = VALIDATION_SHARE,
) -> Known:
    num_train, num_test, num_classes = sizes
    return Known(
        num_train=num_train,
        num_test=num_test,
        num_classes=num_classes,
        input_shape=shape,
        path=path,
        holds=holds,
        validation_share=validation_share,
    )


KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        "cifar10": _known((50_000, 10_000, 10), SMALL, "cifar-10-batches-py"),
        "cifar100": _known((50_000, 10_000, 100), SMALL, "cifar-100-python"),
        "cifar100-40k": _known(
            (50_000, 10_000, 100), SMALL, "cifar-100-python", validation_share=0.2
        ),
        "svhn": _known((73_257, 26_032, 10), SMALL, "train_32x32.mat"),
        "svhn-extra": _known((604_388, 26_032, 10), SMALL, "extra_32x32.mat", validation_share=0.2),
        "mnist": _known((60_000, 10_000, 10), GREY, "MNIST"),
        "imagenet": _known(
            (1_281_167, 50_000, 1000),
            LARGE,
            "imagenet",
            holds="folders train and val, with a folder of pictures for each class in both",
        ),
        "mini-imagenet": _known(
            (60_000, 0, 100),
            (3, 84, 84),
            "mini-imagenet",
            holds="folders train, val and test with a folder of pictures for each of 64, 16 and "
            "20 classes",
        ),
        "caltech256": _known(
            (12_800, 7_680, 256),
            (3, 299, 299),
            "256_ObjectCategories",
            holds="a folder of pictures for each class",
            validation_share=0.2,
        ),
        **{
            f"office31-{domain}": _known(
                (num_pictures - num_pictures // 5, num_pictures // 5, 31),
                LARGE,
                f"office31/{domain}",
                holds="a folder of pictures for each of 31 classes",
            )
            for domain, num_pictures in (("amazon", 2817), ("dslr", 498), ("webcam", 795))
        },
    }
)


OF_TASKS = ("scenes", "coco", "voc", "clips", "something-something-v1")
"""Data that only some tasks have a use for."""


def data_text(text: str) -> str:
    """The name of data in one way, however it was written and from wherever.

    A path is a folder: one with a ``/`` in it, and a word that is no data set's name where there
    is a folder of this name. It becomes ``folder:`` and the whole path. Files of Python functions
    get their whole path too; names stay as they are.

    Example:
        >>> data_text("digits"), data_text("scenes:side=96"), data_text("/photos")
        ('digits', 'scenes:side=96', 'folder:/photos')
    """
    if is_reference(text):
        return absolute(text)
    path = Path(text.removeprefix(PREFIX)).expanduser()
    is_name = text.partition(":")[0] in {*READERS, *OF_FOLDERS, *KNOWN, *OF_TASKS}
    is_path = text.startswith(PREFIX) or "/" in text or (not is_name and path.is_dir())
    return f"{PREFIX}{path.resolve()}" if is_path else text


class Sample(NamedTuple):
    """Data for a dry run.

    Args:
        data: As large as what they stand for, with random values, drawn when they are taken.
        missing: Which files a training needs, and where to put them; None if they are there.
    """

    data: Any
    missing: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPictures:
    """A split as large as a data set's, of pictures that are drawn when they are taken."""

    targets: Int[Tensor, " n"]
    input_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Int[Tensor, " k"]) -> Examples:
        """Draw pictures for these positions."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(len(index), *self.input_shape, generator=generator)
        return Examples(inputs=inputs, targets=self.targets[index])

    def keep(self, index: Int[Tensor, " k"]) -> Self:
        """A split of these examples only."""
        return type(self)(targets=self.targets[index], input_shape=self.input_shape)

    def joined(self, other: Self) -> Self:
        """These examples and then the others."""
        targets = torch.cat([self.targets, other.targets])
        return type(self)(targets=targets, input_shape=self.input_shape)

    def own_scaling(self) -> Scaling | None:
        """None: they have mean 0 and standard deviation 1."""
        return None

    def scaled(self, scaling: Scaling | None) -> Self:
        """The same examples."""
        return self


def random_dataset(
    name: str, limit: int | None = None, hold_out: bool = True, side: int | None = None
) -> Dataset[RandomPictures]:
    """Random pictures of the sizes that a data set has.

    Args:
        name: A key of ``KNOWN``.
        limit: Training examples to keep.
        hold_out: Whether validation examples are kept from training.
        side: Height and width of what the network gets; by default the data set's.

    Raises:
        SpecError: If nothing is known of it.
    """
    if name not in KNOWN:
        raise SpecError(f"the sizes of {name!r} are not known; known are {', '.join(KNOWN)}")
    known = KNOWN[name]
    held_out = round(known.validation_share * known.num_train)
    num_train = min(limit or known.num_train, known.num_train - held_out)
    num_train += 0 if hold_out else held_out

    channels, height, width = known.input_shape
    shape = (channels, side or height, side or width)

    def split(size: int) -> RandomPictures:
        targets = torch.arange(size) % known.num_classes
        return RandomPictures(targets=targets, input_shape=shape)

    return Dataset(
        name=name,
        num_classes=known.num_classes,
        train=split(num_train),
        validation=split(held_out),
        test=split(known.num_test),
    )
