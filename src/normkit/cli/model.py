"""Options that select a model, shared by several commands."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from normkit.cli.shared import require_counts, whole_numbers
from normkit.errors import SpecError
from normkit.lab.checkpoints import Alterations, restored
from normkit.lab.data import MAX_CLASSES, Dataset, load
from normkit.lab.models import build_model
from normkit.lab.own_norms import register_norms
from normkit.text import parts_of

NUM_CLASSES, INPUT_SHAPE = 1000, "3,224,224"  # ImageNet's
MAX_SIDE = 2**14


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options that select a model and its weights."""

    model: str
    """Network: small-resnet, mlp, vgg11, torchvision:NAME, timm:NAME, or FILE.py:FUNCTION."""
    data: str | None = None
    """Data set that it is for: digits, fashion-mnist, cifar10, cifar100, svhn, ./PATH with a folder
    for each class, or FILE.py:FUNCTION."""
    image_size: int | None = None
    """Height and width of the network's input, for folders and functions (default: the pictures'
    own)."""
    checkpoint: Path | None = None
    """File with the weights: .safetensors, or one that torch.save wrote. Norms that were replaced
    before saving are replaced again."""
    own_norms: str | None = None
    """Norms of your own, NAME=FILE.py:CLASS with commas between, which the checkpoint has."""
    num_classes: int | None = None
    """Length of the output (default: the data set's if there is one, else 1000)."""
    input_shape: str | None = None
    """Channels, height and width of an input (default: the data set's if there is one, else
    3,224,224)."""

    def opened(self) -> Dataset | None:
        """The data set of ``--data``; None if none was given.

        Raises:
            NormError: If there is no such data set, or it cannot be read.
        """
        return None if self.data is None else self.read(self.data)

    def read(self, data: str) -> Dataset:
        """Read a data set, its pictures in the size of ``--image-size``.

        Args:
            data: Names it as ``--data`` does.

        Raises:
            NormError: If there is no such data set, or it cannot be read.
        """
        require_counts(self, "image_size", at_most=MAX_SIDE)
        return load(data, None, self.image_size)

    def build(self, dataset: Dataset | None = None) -> nn.Module:
        """Build the model and load its weights; without a checkpoint they are random.

        Args:
            dataset: Gives the number of classes and the input shape if the options do not.

        Raises:
            SpecError: If the model is unknown or cannot take the inputs, or a norm of one's own is
                not there.
            DataError: If the checkpoint cannot be read or does not fit.
        """
        require_counts(self, "num_classes", at_most=MAX_CLASSES)
        if self.own_norms is not None:
            register_norms(parts_of(self.own_norms))
        if self.image_size is not None and dataset is None:
            raise SpecError(
                f"--image-size was given {self.image_size} without --data, whose pictures it is "
                f"for; give --data too, or --input-shape 3,{self.image_size},{self.image_size}"
            )
        known = NUM_CLASSES if dataset is None else dataset.num_classes
        built = build_model(
            self.model,
            num_classes=known if self.num_classes is None else self.num_classes,
            input_shape=self.shape(dataset),
        )
        model = built.model
        if self.checkpoint is not None:
            model = restored(model, self.checkpoint)
        return model.eval()

    def alterations(self) -> Alterations:
        """The changes to the norms that the checkpoint records."""
        return Alterations() if self.checkpoint is None else Alterations.read(self.checkpoint)

    def shape(self, dataset: Dataset | None = None) -> tuple[int, int, int]:
        """Channels, height and width of an input.

        Raises:
            SpecError: If they are not three numbers of 1 or more.
        """
        if self.input_shape is None and dataset is not None:
            return dataset.input_shape
        text = self.input_shape or INPUT_SHAPE
        shape = whole_numbers("--input-shape", text)
        if len(shape) != 3 or 0 in shape:
            raise SpecError(
                f"--input-shape was given {text!r}; it has channels, height and width, all 1 or "
                f"more, such as {INPUT_SHAPE}"
            )
        return shape

    def example(self, dataset: Dataset | None = None) -> torch.Tensor:
        """Return two inputs of zeros, for tracing the model."""
        return torch.zeros(2, *self.shape(dataset))
