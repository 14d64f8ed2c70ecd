"""Scenes: small pictures of one class each at random scale and place on a noisy canvas.

Boxes, masks and the class of each pixel are known. The scene at a position is drawn from the seed
and the position alone, so that nothing has to be kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from normkit.lab.data.annotated import Annotated, Drawn, E, Part, Parts
from normkit.lab.data.dataset import Dataset, Pictures
from normkit.lab.data.named import Options, read_options
from normkit.lab.data.sources import read

SCENES = "scenes"
NUM_SCENES = {"train": 2000, "validation": 50}
SEEDS = {"train": 1, "validation": 2, "test": 3, "single": 4}  # of the scenes, not of a run
INK = 10  # values above it belong to the object, where its brightest is 255
VISIBLE = 0.6  # no object hides more than the rest of another one
NUM_TRIES = 8  # places that are tried for an object
NOISE, GREY = 18.0, 70.0  # standard deviation of the noise, and largest grey value below it


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneOptions(Options):
    """What ``scenes:side=96:most=5:items=fashion-mnist`` says.

    Args:
        side: Height and width of a scene.
        most: Largest number of objects.
        smallest: Side of the smallest object, in percent of the scene's.
        largest: Side of the largest object, likewise.
        test: Number of test scenes.
        items: Data set whose pictures are the objects.
    """

    side: int = 96
    most: int = 5
    smallest: int = 22
    largest: int = 55
    test: int = 200
    items: str = "fashion-mnist"


@lru_cache(maxsize=2)
def scenes(text: str = "scenes") -> Parts[Annotated]:
    """Scenes of a data set's pictures; test scenes show its test pictures.

    Args:
        text: ``scenes``, followed by options if needed, such as ``scenes:side=128``.

    Raises:
        SpecError: If an option is unknown.
        DataError: If the pictures cannot be read.
    """
    options = read_options(SceneOptions, text)
    found = read(options.items)
    parts = drawn_parts(
        found, partial(draw_scene, options), SEEDS, {**NUM_SCENES, "test": options.test}
    )
    return Parts(
        name=text,
        num_classes=found.num_classes,
        input_shape=(found.input_shape[0], options.side, options.side),
        fingerprint=found.fingerprint,
        **parts,
    )


def drawn_parts(
    items: Dataset[Pictures],
    draw: Callable[[Pictures, int, int], E],
    seeds: Mapping[str, int],
    numbers: Mapping[str, int],
) -> dict[str, Part[E]]:
    """The parts of a set whose examples show the pictures of another one.

    Args:
        items: Pictures; those of a part are shown in the same part.
        draw: Draws an example of these pictures, by a seed and its position.
        seeds: Of each part.
        numbers: How many examples each part has.
    """
    parts = {"train": items.train, "validation": items.validation, "test": items.test}
    return {
        name: Part.of(Drawn(partial(draw, pictures, seeds[name]), numbers[name]))
        for name, pictures in parts.items()
    }


def generator_of(seed: int, at: int) -> torch.Generator:
    """Random numbers of the example at a position."""
    return torch.Generator().manual_seed(seed * 1_000_003 + at)


def draw_scene(options: SceneOptions, items: Pictures, seed: int, at: int) -> Annotated:
    """Draw the scene at a position.

    Objects are put one over the other. A mask holds the pixels that are visible in the end, and a
    box is that of its mask. An object that would hide more than two fifths of another one is put
    elsewhere, and left out where that fails.

    Args:
        options: Size of the scene, and the largest number of objects.
        items: Pictures of objects.
        seed: Of the part that the scene belongs to.
        at: Position of the scene.
    """
    generator = generator_of(seed, at)
    canvas = _canvas(items.input_shape[0], options.side, generator)
    visible: list[Bool[Tensor, "h w"]] = []
    whole: list[int] = []
    labels: list[Tensor] = []
    number = int(torch.randint(1, options.most + 1, (), generator=generator))
    for index in torch.randint(len(items), (number,), generator=generator):
        picture = items.picture(int(index))
        for _ in range(NUM_TRIES):
            placed, mask = _placed(picture, options, generator)
            if mask.any() and _leaves_visible(mask, visible, whole):
                visible = [other & ~mask for other in visible]
                canvas = torch.where(mask, placed, canvas)
                visible.append(mask)
                whole.append(int(mask.sum()))
                labels.append(items.targets[int(index)] + 1)
                break
    masks = torch.stack(visible)
    return Annotated(
        picture=canvas.round().clamp(0, 255).to(torch.uint8),
        boxes=boxes_of(masks),
        labels=torch.stack(labels),
        masks=masks,
    )


def boxes_of(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n 4"]:
    """The smallest boxes around masks; a pixel at ``(x, y)`` reaches to ``(x + 1, y + 1)``."""
    return torch.stack([_box_of(mask) for mask in masks]) if len(masks) else torch.zeros(0, 4)


def _box_of(mask: Bool[Tensor, "h w"]) -> Float[Tensor, " 4"]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def _canvas(num_channels: int, side: int, generator: torch.Generator) -> Float[Tensor, "c h w"]:
    """A few grey clouds under noise."""
    clouds = GREY * torch.rand(1, num_channels, 4, 4, generator=generator)
    clouds = functional.interpolate(clouds, size=(side, side), mode="bilinear")[0]
    return clouds + NOISE * torch.randn(num_channels, side, side, generator=generator)


def _placed(
    picture: UInt8[Tensor, "c h w"], options: SceneOptions, generator: torch.Generator
) -> tuple[Float[Tensor, "c side side"], Bool[Tensor, "side side"]]:
    """A picture at a random scale and place on an empty canvas, and the pixels that it covers."""
    side, chance = options.side, float(torch.rand((), generator=generator))
    percent = options.smallest + (options.largest - options.smallest) * chance
    own = min(side, max(4, round(percent * side / 100)))
    bright = picture[None].float() * (255 / max(1, int(picture.max())))
    scaled = functional.interpolate(bright, size=(own, own), mode="bilinear", antialias=True)[0]
    y, x = torch.randint(side - own + 1, (2,), generator=generator).tolist()
    canvas = torch.zeros(picture.shape[0], side, side)
    canvas[:, y : y + own, x : x + own] = scaled
    return canvas, canvas.amax(0) > INK


def _leaves_visible(
    mask: Bool[Tensor, "h w"], visible: list[Bool[Tensor, "h w"]], whole: list[int]
) -> bool:
    """Whether enough of each object stays visible behind a new one."""
    return all(
        int((other & ~mask).sum()) >= VISIBLE * size
        for other, size in zip(visible, whole, strict=True)
    )


@lru_cache(maxsize=1)
def single_items(text: str, number: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """Pictures in [0, 1] of half a scene's side, each of one object that is as large as in scenes.

    Args:
        text: Name of the scenes, whose training pictures are shown.
        number: Pictures.

    Returns:
        The pictures, and their classes from 0.
    """
    options = read_options(SceneOptions, text)
    half = replace(
        options,
        side=options.side // 2,
        most=1,
        smallest=min(95, 2 * options.smallest),
        largest=min(95, 2 * options.largest),
    )
    items = read(options.items).train
    drawn = [draw_scene(half, items, SEEDS["single"], at) for at in range(number)]
    pictures = torch.stack([each.picture for each in drawn]).float() / 255
    return pictures, torch.stack([each.labels[0] for each in drawn]) - 1
