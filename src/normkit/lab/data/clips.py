"""Clips: a small picture that moves, turns, grows or fades; the class is what it does.

Every class has another one that shows the same frames in the opposite order, so that neither a
single frame nor the set of frames tells them apart.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from normkit.lab.data.annotated import Parts
from normkit.lab.data.dataset import Pictures
from normkit.lab.data.named import Options, read_options
from normkit.lab.data.scenes import drawn_parts, generator_of
from normkit.lab.data.sources import read

NUM_CLIPS = {"train": 2000, "validation": 200}
SEEDS = {"train": 11, "validation": 12, "test": 13}
NOISE = 12.0  # standard deviation of what is added to each frame, in bytes

DOES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "moves left": ("x", -1),
        "moves right": ("x", 1),
        "moves up": ("y", -1),
        "moves down": ("y", 1),
        "turns left": ("angle", -1),
        "turns right": ("angle", 1),
        "shrinks": ("scale", -1),
        "grows": ("scale", 1),
        "fades": ("light", -1),
        "appears": ("light", 1),
    }
)
"""What changes in the clips of each class, and in which direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOptions(Options):
    """What ``clips:side=40:frames=8:items=fashion-mnist`` says.

    Args:
        side: Height and width of a frame.
        frames: Frames of a clip.
        test: Number of test clips.
        items: Data set whose pictures are shown.
    """

    side: int = 40
    frames: int = 8
    test: int = 500
    items: str = "fashion-mnist"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Frames of a clip, and its class.

    Args:
        frames: Bytes, ``(T, C, H, W)``.
        label: Its class, from 0.
    """

    frames: UInt8[Tensor, "t c h w"]
    label: int


@lru_cache(maxsize=2)
def clips(text: str = "clips") -> Parts[Clip]:
    """Clips of a data set's pictures; test clips show its test pictures.

    Args:
        text: ``clips``, followed by options if needed, such as ``clips:frames=16``.

    Raises:
        SpecError: If an option is unknown.
        DataError: If the pictures cannot be read.
    """
    options = read_options(ClipOptions, text)
    found = read(options.items)
    parts = drawn_parts(
        found, partial(draw_clip, options), SEEDS, {**NUM_CLIPS, "test": options.test}
    )
    return Parts(
        name=text,
        num_classes=len(DOES),
        input_shape=(found.input_shape[0], options.side, options.side),
        fingerprint=found.fingerprint,
        class_names=tuple(DOES),
        **parts,
    )


def draw_clip(options: ClipOptions, items: Pictures, seed: int, at: int) -> Clip:
    """Draw the clip at a position, whose class is the position modulo the number of classes.

    Args:
        options: Size and length of a clip.
        items: Pictures, of which one is shown.
        seed: Of the part that the clip belongs to.
        at: Position of the clip.
    """
    generator = generator_of(seed, at)
    label = at % len(DOES)
    what, direction = DOES[list(DOES)[label]]
    picture = items.picture(int(torch.randint(len(items), (), generator=generator)))
    course = torch.linspace(-1, 1, options.frames) * direction
    path = _path(what, course, generator)
    shown = _shown(picture.float(), path, options.side)
    noise = torch.randn(shown.shape, generator=generator)
    frames = (shown + NOISE * noise).round().clamp(0, 255).to(torch.uint8)
    return Clip(frames=frames, label=label)


def _path(
    what: str, course: Float[Tensor, " t"], generator: torch.Generator
) -> dict[str, Float[Tensor, " t"]]:
    """Place, angle, scale and light in each frame.

    Where they stand still is drawn at random; what changes runs evenly through its range, from a
    random start.
    """
    x, y, angle, scale, light, extent = torch.rand(6, generator=generator).tolist()
    still = {
        "x": 0.3 * (2 * x - 1),
        "y": 0.3 * (2 * y - 1),
        "angle": 0.4 * (2 * angle - 1),
        "scale": 0.55 + 0.2 * scale,
        "light": 0.7 + 0.3 * light,
    }
    path = {name: torch.full_like(course, value) for name, value in still.items()}
    half = 0.5 + 0.5 * extent  # of the largest change
    change = {"x": 0.4, "y": 0.4, "angle": math.pi / 3, "scale": 0.25, "light": 0.4}[what]
    middle = {"x": 0.0, "y": 0.0, "angle": still["angle"], "scale": 0.6, "light": 0.6}[what]
    path[what] = middle + change * half * course
    return path


def _shown(
    picture: Float[Tensor, "c h w"], path: Mapping[str, Float[Tensor, " t"]], side: int
) -> Float[Tensor, "t c side side"]:
    """A picture in each frame of its path, on black."""
    cos, sin = path["angle"].cos() / path["scale"], path["angle"].sin() / path["scale"]
    x, y = path["x"], path["y"]
    rows = [
        torch.stack([cos, sin, -cos * x - sin * y], 1),
        torch.stack([-sin, cos, sin * x - cos * y], 1),
    ]
    number = len(x)
    grid = functional.affine_grid(
        torch.stack(rows, 1), [number, picture.shape[0], side, side], align_corners=False
    )
    shown = functional.grid_sample(picture.expand(number, -1, -1, -1), grid, align_corners=False)
    return path["light"][:, None, None, None] * shown
