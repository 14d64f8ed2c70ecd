"""Pictures with boxes, masks and maps of classes, and the sets that they form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

BACKGROUND, IGNORED = 0, 255  # classes of a pixel that belongs to nothing, and of one left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotated:
    """A picture and what is in it.

    Args:
        picture: Bytes, or floating point in [0, 1].
        boxes: Corners ``(x1, y1, x2, y2)`` in pixels.
        labels: Class of each box, from 1.
        masks: Pixels of each box's object; none where only boxes are known.
        is_crowd: Whether a box is of a crowd, which is not counted in evaluation.
    """

    picture: Shaped[Tensor, "c h w"]
    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]
    masks: Bool[Tensor, "n h w"] | None = None
    is_crowd: Bool[Tensor, " n"] | None = None

    def class_map(self) -> Int[Tensor, "h w"]:
        """Class of each pixel, 0 for the background; a later mask covers an earlier one."""
        found = torch.zeros(self.picture.shape[1:], dtype=torch.int64)
        for label, mask in zip(self.labels, () if self.masks is None else self.masks, strict=True):
            found[mask] = label
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """A picture and the class of each of its pixels, ``IGNORED`` where none is counted."""

    picture: Shaped[Tensor, "c h w"]
    classes: Int[Tensor, "h w"]


E_co = TypeVar("E_co", covariant=True)
E = TypeVar("E")


class Source(Protocol[E_co]):
    """Examples that are read, or drawn, one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int) -> E_co: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Generic[E]):
    """Training, validation or test examples: some of a source.

    Args:
        source: Where they come from.
        positions: Which they are.
    """

    source: Source[E]
    positions: Int[Tensor, " n"]

    @classmethod
    def of(cls, source: Source[E]) -> Self:
        """All examples of a source."""
        return cls(source=source, positions=torch.arange(len(source)))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, at: int) -> E:
        return self.source[int(self.positions[at])]

    def take(self, index: Int[Tensor, " k"]) -> list[E]:
        """Examples at these positions, in this order."""
        return [self[at] for at in index.tolist()]

    def keep(self, index: Int[Tensor, " k"]) -> Self:
        """A part of these examples only."""
        return replace(self, positions=self.positions[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts(Generic[E]):
    """A data set in three disjoint parts.

    Args:
        name: What messages call it.
        num_classes: Classes, the background not counted.
        input_shape: Channels, height and width of a picture; of a frame, in a clip.
        train: Those that are trained on.
        validation: Those that choose.
        test: Those that judge.
        fingerprint: Of everything that was read; it changes when the files do.
        notes: What a user should know, in sentences.
        class_names: Names of the classes, from the first.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    train: Part[E]
    validation: Part[E]
    test: Part[E]
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = field(default=())

    @property
    def num_examples(self) -> int:
        """Training examples."""
        return len(self.train)

    def limited(self, limit: int | None) -> Self:
        """The same with at most so many training examples; validation shrinks with them."""
        if limit is None or limit >= len(self.train):
            return self
        share = limit / len(self.train)
        num_validation = max(1, round(share * len(self.validation)))
        return replace(
            self,
            train=self.train.keep(torch.arange(limit)),
            validation=self.validation.keep(
                torch.arange(min(num_validation, len(self.validation)))
            ),
        )

    def with_validation_in_training(self) -> Self:
        """The same, where validation examples are trained on as well."""
        return replace(self, train=Part.of(Chained((self.train, self.validation))))


def held_out(source: Source[E], share: float, seed: int = 0) -> tuple[Part[E], Part[E]]:
    """Hold a share of the examples out, the same ones each time.

    Returns:
        The rest, then those held out; one at least, where there are two.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    num_held = min(len(source) - 1, max(1, round(share * len(source))))
    rest, held = order[num_held:].sort().values, order[:num_held].sort().values
    return Part(source=source, positions=rest), Part(source=source, positions=held)


@dataclass(frozen=True, slots=True)
class Chained(Generic[E]):
    """The examples of several parts, one after the other."""

    parts: Sequence[Part[E]]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, at: int) -> E:
        for part in self.parts:
            if at < len(part):
                return part[at]
            at -= len(part)
        raise IndexError(at)


@dataclass(frozen=True, slots=True)
class Drawn(Generic[E]):
    """Examples that a function draws: the one at a position is the same each time."""

    draw: Callable[[int], E]
    number: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, at: int) -> E:
        return self.draw(at)
