"""A split whose pictures are read one by one when they are needed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from normkit.errors import DataError
from normkit.lab.data.dataset import SPLIT_SEED, Examples, Scaling, stratified_order
from normkit.lab.data.views import at_size

NUM_FOR_SCALING = 2_000  # pictures whose values decide the scaling

SIXTEEN_BITS = 2**16 - 1
GREY = ("1", "L")  # PIL's modes of grey pictures with up to 8 bits; those with more begin with I

ReadPicture = Callable[[int], Shaped[Tensor, "c h w"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """A split that has only the classes in memory.

    Args:
        read: Reads the picture at a position of the source, as bytes or in floating point.
        positions: Positions of the examples in the source.
        targets: Class of each example.
        input_shape: Channels, height and width of one input; pictures are resized to it.
        scaling: Scaling of the pictures' values.
    """

    read: ReadPicture
    positions: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    input_shape: tuple[int, int, int]
    scaling: Scaling | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def picture(self, at: int) -> Shaped[Tensor, "c h w"]:
        """The picture of an example, as it was read."""
        return self.read(int(self.positions[at]))

    def take(self, index: Int[Tensor, " k"]) -> Examples:
        """Examples at these positions, in this order, without augmentation."""
        _, height, width = self.input_shape
        pictures = [at_size(self.picture(at), (height, width)) for at in index.tolist()]
        values = torch.stack(pictures) if pictures else torch.empty(0, *self.input_shape)
        inputs = values.float() if self.scaling is None else self.scaling(values)
        return Examples(inputs=inputs, targets=self.targets[index])

    def keep(self, index: Int[Tensor, " k"]) -> Self:
        """A split of these examples only."""
        return replace(self, positions=self.positions[index], targets=self.targets[index])

    def joined(self, other: Self) -> Self:
        """These examples, then the others, which must come from the same source."""
        return replace(
            self,
            positions=torch.cat([self.positions, other.positions]),
            targets=torch.cat([self.targets, other.targets]),
        )

    def own_scaling(self) -> Scaling | None:
        """Scaling by some pictures of all classes; None for floating-point pictures."""
        if self.picture(0).is_floating_point():
            return None
        sample = stratified_order(self.targets, SPLIT_SEED)[:NUM_FOR_SCALING]
        return Scaling.of(self.take(sample).inputs)

    def scaled(self, scaling: Scaling | None) -> Self:
        """The same examples, which ``take`` then scales in this way."""
        return replace(self, scaling=scaling)


def _bytes_of(values: Any, where: str) -> Shaped[Tensor, "1 h w"]:
    """Convert grey values of 8 or 16 bits to bytes.

    Raises:
        DataError: If there are other values.
    """
    whole = bool((values == values.round()).all())
    if not whole or values.min() < 0 or values.max() > SIXTEEN_BITS:
        raise DataError(
            f"{where} has grey values from {values.min():g} to {values.max():g}; save it with 8 or "
            f"16 bits"
        )
    scale = SIXTEEN_BITS / 255 if values.max() > 255 else 1
    return torch.from_numpy((values / scale).round()).to(torch.uint8)[None]


def as_tensor(picture: Any, where: str) -> Shaped[Tensor, "c h w"]:
    """Convert a picture of PIL to a byte tensor ``(c, h, w)``; return a tensor as it is.

    Raises:
        DataError: If the picture is neither.
    """
    if isinstance(picture, Tensor):
        if picture.ndim == 3:
            return picture
        given = f"a tensor of shape {tuple(picture.shape)}"
    elif hasattr(picture, "convert"):
        import numpy as np  # needed only for pictures of PIL

        if picture.mode.startswith(("I", "F")):
            return _bytes_of(np.array(picture, dtype=np.float64), where)
        grey = picture.mode in GREY
        values = np.array(picture.convert("L" if grey else "RGB"))
        return torch.from_numpy(values[None] if grey else values.transpose(2, 0, 1).copy())
    else:
        given = f"a {type(picture).__name__}"
    raise DataError(
        f"{where} has {given} as its picture; give a tensor of channels, height and width, or a "
        f"picture of PIL's"
    )
