"""A split whose pictures are read when they are needed, one by one."""

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
GREY = ("1", "L")  # PIL's modes; those of more bits begin with I

ReadPicture = Callable[[int], Shaped[Tensor, "c h w"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """A split of which only the classes are in memory.

    Args:
        read: Gives the picture at a position of the source, as bytes or in floating point.
        positions: Where the examples are in the source.
        targets: Class of each example.
        input_shape: Channels, height and width of one input; other pictures are scaled.
        scaling: What becomes of a picture's values.
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
        """Examples at these positions, in this order, as at evaluation."""
        _, height, width = self.input_shape
        pictures = [at_size(self.picture(at), (height, width)) for at in index.tolist()]
        values = torch.stack(pictures) if pictures else torch.empty(0, *self.input_shape)
        inputs = values.float() if self.scaling is None else self.scaling(values)
        return Examples(inputs=inputs, targets=self.targets[index])

    def keep(self, index: Int[Tensor, " k"]) -> Self:
        """A split of these examples only."""
        return replace(self, positions=self.positions[index], targets=self.targets[index])

    def joined(self, other: Self) -> Self:
        """These examples and then the others, which are of the same source."""
        return replace(
            self,
            positions=torch.cat([self.positions, other.positions]),
            targets=torch.cat([self.targets, other.targets]),
        )

    def own_scaling(self) -> Scaling | None:
        """Of some pictures of all classes; None if they are in floating point, taken as it is."""
        if self.picture(0).is_floating_point():
            return None
        sample = stratified_order(self.targets, SPLIT_SEED)[:NUM_FOR_SCALING]
        return Scaling.of(self.take(sample).inputs)

    def scaled(self, scaling: Scaling | None) -> Self:
        """The same examples, scaled so when they are taken."""
        return replace(self, scaling=scaling)


def _bytes_of(values: Any, where: str) -> Shaped[Tensor, "1 h w"]:
    """Grey values of 8 or 16 bits as bytes.

    Raises:
        DataError: If there are others.
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
    """A picture as channels, height and width: bytes of what PIL reads, a tensor as it is.

    Raises:
        DataError: If it is neither.
    """
    if isinstance(picture, Tensor):
        if picture.ndim == 3:
            return picture
        given = f"a tensor of shape {tuple(picture.shape)}"
    elif hasattr(picture, "convert"):
        import numpy as np  # only where pictures are PIL's

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
