"""Deterministic changes of pictures, by which one data set becomes another domain."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from normkit.errors import DataError, SpecError
from normkit.lab.data.dataset import Pictures, Split
from normkit.text import printable

Shift = Callable[[UInt8[Tensor, "n c h w"], int], UInt8[Tensor, "n c h w"]]
DEGREES = 30
BLUR_DEVIATION = 0.06  # of the blur's Gaussian, as a share of the side: 1.7 of 28 pixels
NUM_TEXTURES, TEXTURE_CELLS = 256, 7  # backgrounds that there are; bright and dark cells of a side
ROWS_AT_ONCE = 4096


def _invert(pictures: UInt8[Tensor, "n c h w"], top: int) -> UInt8[Tensor, "n c h w"]:
    return top - pictures


def _rotate(pictures: UInt8[Tensor, "n c h w"], _top: int) -> UInt8[Tensor, "n c h w"]:
    angle = torch.tensor(DEGREES * torch.pi / 180)
    cos, sin = float(angle.cos()), float(angle.sin())
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(pictures), 2, 3)
    grid = functional.affine_grid(turn, list(pictures.shape), align_corners=False)
    turned = functional.grid_sample(pictures.float(), grid, align_corners=False)
    return turned.round().clamp(0, 255).to(torch.uint8)


def _blur(pictures: UInt8[Tensor, "n c h w"], _top: int) -> UInt8[Tensor, "n c h w"]:
    found, num_channels = pictures.float(), pictures.shape[1]
    for axis in (2, 3):
        deviation = BLUR_DEVIATION * pictures.shape[axis]
        radius = min(max(1, round(2 * deviation)), pictures.shape[axis] - 1)
        at = torch.arange(-radius, radius + 1)
        weights = torch.exp(-(at.square()) / (2 * deviation**2))
        weights = (weights / weights.sum()).expand(num_channels, 1, -1)
        kernel = weights.unsqueeze(3 if axis == 2 else 2)
        edge = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        padded = functional.pad(found, edge, mode="replicate")
        found = functional.conv2d(padded, kernel, groups=num_channels)
    return found.round().clamp(0, 255).to(torch.uint8)


def _texture(pictures: UInt8[Tensor, "n c h w"], top: int) -> UInt8[Tensor, "n c h w"]:
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(NUM_TEXTURES, 1, TEXTURE_CELLS, TEXTURE_CELLS, generator=generator)
    textures = functional.interpolate(top * cells, size=pictures.shape[2:], mode="bilinear")
    # a picture's values choose its texture, so that it has the same one wherever it stands
    chosen = textures[pictures.sum((1, 2, 3), dtype=torch.int64) % NUM_TEXTURES]
    return torch.maximum(pictures, chosen.round().to(torch.uint8))


SHIFTS: Mapping[str, Shift] = MappingProxyType(
    {"inverted": _invert, "rotated": _rotate, "blurred": _blur, "textured": _texture}
)
"""Changes of pictures of bytes, by name."""


def shifted(split: Split, names: str, top: int = 255) -> Pictures:
    """The pictures of a split, changed.

    ======== ====================================================================
    inverted dark becomes bright
    rotated  turned by 30 degrees
    blurred  a Gaussian filter
    textured bright spots behind the object, which has to be brighter than its background
    ======== ====================================================================

    Args:
        split: Pictures of bytes, in memory.
        names: One of ``SHIFTS``, or several with ``+`` between, in order.
        top: The brightest value that there can be; 16 for scikit-learn's digits.

    Raises:
        SpecError: If a name is unknown.
        DataError: If the pictures are not bytes in memory.
    """
    unknown = [name for name in names.split("+") if name not in SHIFTS]
    if unknown:
        raise SpecError(
            f"there is no shift {printable(unknown[0])!r}; known are {', '.join(SHIFTS)}, or "
            f"several with + between"
        )
    if not isinstance(split, Pictures) or split.values.dtype != torch.uint8:
        raise DataError(
            f"pictures are {names} where they are bytes of one size in memory, and these are not; "
            f"give a folder of target pictures"
        )
    parts = split.values.split(ROWS_AT_ONCE)
    for name in names.split("+"):
        parts = [SHIFTS[name](part, top) for part in parts]
    return Pictures(values=torch.cat(list(parts)), targets=split.targets, scaling=split.scaling)
