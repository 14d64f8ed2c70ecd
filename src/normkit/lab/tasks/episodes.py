"""Episodes: a few labelled pictures of new classes, by which others are to be recognised."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from normkit.errors import DataError
from normkit.lab.student import half_width


@dataclass(frozen=True, slots=True)
class Episode:
    """Pictures of some classes, by their positions; row ``w`` has those of class ``w``.

    Args:
        support: Labelled pictures.
        queries: Pictures to be recognised.
    """

    support: Int[Tensor, "ways shots"]
    queries: Int[Tensor, "ways queries"]

    @property
    def positions(self) -> Int[Tensor, " n"]:
        """All of them, the support first."""
        return torch.cat([self.support.flatten(), self.queries.flatten()])


def draw_episodes(
    targets: Int[Tensor, " n"], *, ways: int, shots: int, queries: int, number: int, seed: int
) -> list[Episode]:
    """Draw classes, and pictures of each without repetition; equal seeds draw equal episodes.

    Args:
        targets: Class of each picture.
        ways: Classes of an episode.
        shots: Labelled pictures of each class.
        queries: Pictures of each class to be recognised.
        number: Episodes.
        seed: Of the draws.

    Raises:
        DataError: If there are too few classes, or too few pictures of one.
    """
    members = [(targets == label).nonzero().flatten() for label in targets.unique()]
    if len(members) < ways:
        raise DataError(
            f"{ways}-way episodes were asked for, and there are {len(members)} classes; ask for "
            f"{len(members)} ways or fewer"
        )
    fewest = min(len(positions) for positions in members)
    if fewest < shots + queries:
        raise DataError(
            f"{shots}-shot episodes with {queries} queries take {shots + queries} pictures of each "
            f"class, and one class has {fewest}; ask for "
            f"{max(fewest - shots, 0)} queries or fewer, or give more pictures"
        )
    generator = torch.Generator().manual_seed(seed)
    return [_drawn(members, ways, shots, queries, generator) for _ in range(number)]


def _drawn(
    members: Sequence[Int[Tensor, " m"]],
    ways: int,
    shots: int,
    queries: int,
    generator: torch.Generator,
) -> Episode:
    chosen = torch.randperm(len(members), generator=generator)[:ways].tolist()
    rows = []
    for at in chosen:
        order = torch.randperm(len(members[at]), generator=generator)
        rows.append(members[at][order[: shots + queries]])
    both = torch.stack(rows)
    return Episode(support=both[:, :shots], queries=both[:, shots:])


def imprinted(support: Float[Tensor, "ways shots d"]) -> Float[Tensor, "ways d"]:
    r"""The classifier's weights of new classes.

    .. math::  w_c \propto \tfrac{1}{K} \sum_k f_{ck} / \lVert f_{ck} \rVert,
        \qquad \lVert w_c \rVert = 1

    Args:
        support: Features of the labelled pictures, of any length.

    Source:
        Qi, Brown & Lowe 2018, arXiv:1712.07136, section 3.2.
    """
    return functional.normalize(functional.normalize(support, dim=-1).mean(1), dim=-1)


def accuracy(
    support: Float[Tensor, "ways shots d"], queries: Float[Tensor, "ways queries d"]
) -> float:
    """Share of the queries whose cosine with the weights of their own class is the largest."""
    scores = functional.normalize(queries, dim=-1) @ imprinted(support).T
    return (
        (scores.argmax(-1) == torch.arange(len(queries), device=queries.device)[:, None])
        .double()
        .mean()
        .item()
    )


def mean_and_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """Mean over episodes, and half of its 95 % interval by Student's t.

    Args:
        accuracies: Of two episodes or more.
    """
    values = torch.tensor(accuracies, dtype=torch.float64)
    return values.mean().item(), half_width(values.std().item(), len(values))
