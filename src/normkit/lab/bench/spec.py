"""The spec of a benchmark: which norms, maps, peers and settings it measures."""

import json
import math
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from normkit import NormSpec, build
from normkit.errors import SpecError
from normkit.lab.environment import memory_bytes
from normkit.lab.files import require_file
from normkit.lab.frozen import Count, Frozen, Threads
from normkit.lab.lines import first_complaint

Shape = tuple[Count, Count, Count]  # channels, height, width
Against = Literal["torch", "composition", "compile"]

RESNET50: tuple[Shape, ...] = (
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 56, 56), (128, 28, 28), (512, 28, 28),
    (256, 28, 28), (256, 14, 14), (1024, 14, 14), (512, 14, 14), (512, 7, 7), (2048, 7, 7),
)  # fmt: skip
"""The distinct input shapes of ResNet-50's norms, for a picture of 224 by 224."""

SMALL: tuple[Shape, ...] = ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))
SHAPES = {"resnet50": RESNET50, "small": SMALL}

TINY_BATCH_SIZE = 2
TINY_SHAPE: Shape = (64, 8, 8)
"""A map so small that the fixed cost of a call dominates."""


class BenchSpec(Frozen):
    """Everything that decides what a benchmark measures."""

    norms: tuple[str, ...] = Field(min_length=1, description="one norm or more")
    shapes: str = Field(default="resnet50", description="resnet50, small or a file")
    maps: tuple[Shape, ...] = Field(min_length=1, description="shapes (channels, height, width)")
    batch_sizes: tuple[Count, ...] = Field(min_length=1, description="one batch size or more")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field(
        default="float32", description="the dtype of the maps"
    )
    memory_format: Literal["contiguous", "channels_last"] = Field(
        default="contiguous", description="contiguous or channels_last"
    )
    against: tuple[Against, ...] = Field(
        default=("torch", "composition"),
        min_length=1,
        description="torch, composition and compile, any of them",
    )
    device: str = Field(default="cpu", description="a torch device such as cpu or cuda")
    threads: Threads = Field(default=1, description="CPU threads, 1 or more")
    repeats: Count = Field(default=200, description="the most times that a call is timed")
    budget_s: float = Field(
        default=0.5, ge=0, description="the seconds after which a call is not repeated"
    )

    @field_validator("norms")
    @classmethod
    def _canonical(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(NormSpec.parse(value)) for value in values)

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        """Refuse maps of which a dozen do not fit into this machine's memory."""
        largest = max(self.batch_sizes) * max(math.prod(shape) for shape in self.maps)
        needed = 12 * largest * self.torch_dtype.itemsize
        if self.device == "cpu" and needed > memory_bytes():
            raise SpecError(
                f"the largest map has {largest} values; measuring it takes about "
                f"{needed / 2**30:.3g} GiB, and this machine has {memory_bytes() / 2**30:.3g}; "
                f"give smaller --batch-sizes or --shapes"
            )
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The maps' dtype."""
        return getattr(torch, self.dtype)

    @property
    def torch_memory_format(self) -> torch.memory_format:
        """The maps' layout."""
        last = self.memory_format == "channels_last"
        return torch.channels_last if last else torch.contiguous_format

    def inputs(self) -> list[tuple[int, Shape]]:
        """Batch sizes and shapes of all maps, the tiny map first."""
        tiny = [(TINY_BATCH_SIZE, TINY_SHAPE)]
        return tiny + [(size, shape) for size in self.batch_sizes for shape in self.maps]


def read_shapes(text: str) -> tuple[Shape, ...]:
    """Read shapes by the name of a set, or from a file with a JSON list of ``[C, H, W]``.

    Raises:
        SpecError: If there is no such set or file, or the file holds something else.
    """
    if text in SHAPES:
        return SHAPES[text]
    known = f"name {' or '.join(SHAPES)}, or a file with a JSON list of [C, H, W]"
    try:
        require_file(Path(text))
        content = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"--shapes was given {text!r}, but {error}; {known}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the shapes file {text} is not JSON ({error}); {known}") from error
    try:
        shapes = TypeAdapter(list[Shape]).validate_python(content)
    except ValidationError as error:
        said = f"the shapes file {text}, at {first_complaint(error)}; {known}"
        raise SpecError(said) from error
    if not shapes:
        raise SpecError(f"the shapes file {text} lists no shape; {known}")
    return tuple(shapes)


def build_norm(norm: str, batch_size: int, shape: Shape) -> torch.nn.Module:
    """Build a norm for maps of this shape.

    Raises:
        SpecError: If the norm cannot be built.
        PartitionError: If its groups do not fit the map.
    """
    channels, height, width = shape
    return build(norm, channels, batch_size=batch_size, num_positions=height * width)
