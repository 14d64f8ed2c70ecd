"""Batches of a split in a given order, read ahead by processes of their own where that helps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from normkit.lab.data import Examples
from normkit.lab.data.dataset import Pictures
from normkit.lab.data.streamed import Streamed
from normkit.lab.data.views import Augmentation
from normkit.lab.device import seeded


@dataclass(frozen=True, slots=True)
class Loading:
    """How training pictures are read.

    Args:
        augment: Names of random changes.
        seed: Of the changes; equal seeds give equal changes, however many processes read.
        num_workers: Processes that read ahead; 0 for none.
    """

    augment: tuple[str, ...] = ()
    seed: int = 0
    num_workers: int = 0


def loaded_batches(
    examples: Any, parts: Sequence[Int[Tensor, " b"]], loading: Loading
) -> Iterator[Any]:
    """The batches at these positions, in this order.

    Args:
        examples: A split of pictures, or what a task's epoch goes through.
        parts: Positions of the examples of each batch.
        loading: How they are read.
    """
    if hasattr(examples, "batches"):
        return examples.batches(parts, loading)
    split: Any = examples
    if not isinstance(split, Pictures | Streamed) or (
        not loading.augment and isinstance(split, Pictures)
    ):
        device = getattr(split, "targets", torch.empty(0)).device
        return (split.take(part.to(device)) for part in parts)
    return iter(
        DataLoader(
            _Views(split, loading),  # type: ignore[arg-type]
            batch_sampler=[part.tolist() for part in parts],  # type: ignore[arg-type]
            num_workers=loading.num_workers,
            generator=torch.Generator().manual_seed(0),  # else it draws from the run's random state
            collate_fn=_Collate(split),
        )
    )


def read_ahead(
    make: Callable[[Int[Tensor, " b"]], Any], parts: Sequence[Int[Tensor, " b"]], num_workers: int
) -> Iterator[Any]:
    """The batches that a function makes of positions, in their order.

    Args:
        make: Draws nothing from a random state that it does not seed itself.
        parts: Positions of the examples of each batch.
        num_workers: Processes that make batches ahead; 0 for none.
    """
    if num_workers == 0:
        return map(make, parts)
    return iter(
        DataLoader(
            _Made(make, parts),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),  # else it draws from the run's random state
            collate_fn=_as_it_is,
        )
    )


@dataclass(frozen=True, slots=True)
class _Made:
    make: Callable[[Int[Tensor, " b"]], Any]
    parts: Sequence[Int[Tensor, " b"]]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, at: int) -> Any:
        return self.make(self.parts[at])


def _as_it_is(batch: Any) -> Any:
    return batch


class _Views:
    """Training pictures as the network sees them; a picture's change is drawn from its place."""

    def __init__(self, split: Pictures | Streamed, loading: Loading) -> None:
        _, height, width = split.input_shape
        self.split, self.seed = split, loading.seed
        self.augmentation = Augmentation(loading.augment, (height, width))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        with seeded((self.seed * 1_000_003 + at) % 2**63):
            view = self.augmentation(self.split.picture(at))
        return view, self.split.targets[at]


@dataclass(frozen=True, slots=True)
class _Collate:
    split: Pictures | Streamed

    def __call__(self, items: Sequence[tuple[Tensor, Tensor]]) -> Examples:
        views, targets = zip(*items, strict=True)
        values, scaling = torch.stack(views), self.split.scaling
        inputs = values.float() if scaling is None else scaling(values)
        return Examples(inputs=inputs, targets=torch.stack(targets))
