"""Clusters of target features that start from the centres of the source's classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from normkit.errors import DataError

MOST_ROUNDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    r"""Examples in as many clusters as there are classes.

    Distances are :math:`(1 - \cos) / 2`, in [0, 1].

    Args:
        centers: A unit vector for each class.
        labels: Class of each example's cluster.
        distances: Of each example to the centre of its cluster.
        center_distance: Mean distance of a cluster's centre to the centre of the source's class.
    """

    centers: Float[Tensor, "m d"]
    labels: Int[Tensor, " n"]
    distances: Float[Tensor, " n"]
    center_distance: float

    def certain(self, largest_distance: float, fewest: int) -> "ByClass":
        """Leave out examples that are far from their centre, then classes with too few examples.

        Args:
            largest_distance: An example is kept if it is nearer than this.
            fewest: A class is kept if it keeps so many examples.
        """
        kept = {
            label: ((self.labels == label) & (self.distances < largest_distance)).nonzero()[:, 0]
            for label in range(len(self.centers))
        }
        return {label: members for label, members in kept.items() if len(members) >= fewest}


ByClass = dict[int, Int[Tensor, " k"]]
"""Positions of examples, by class."""


def class_centers(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int
) -> Float[Tensor, "m d"]:
    """Unit vector in the direction of the sum of each class's unit vectors; 0 without examples.

    Raises:
        DataError: If a feature is not finite.
    """
    _require_finite(features)
    directions = functional.normalize(features.double())
    sums = directions.new_zeros(num_classes, features.shape[1])
    return functional.normalize(sums.index_add_(0, labels, directions))


def spherical_clusters(features: Float[Tensor, "n d"], initial: Float[Tensor, "m d"]) -> Clusters:
    """Spherical k-means: assign by the angle and move the centres, until no example moves.

    A cluster that has lost all its examples goes back to its initial centre. At the end clusters
    are named by the initial centres: each cluster gets one class, so that the sum of the distances
    is least.

    Args:
        features: A row for each example.
        initial: A centre for each class, from the source.

    Raises:
        DataError: If a feature is not finite.

    Source:
        Kang et al. 2019, section 3.4; the naming is that of the authors' code.
    """
    _require_finite(features)
    directions = functional.normalize(features.double())
    start = functional.normalize(initial.double())
    centers, labels = start, torch.full((len(features),), -1)
    for _ in range(MOST_ROUNDS):
        nearest = _nearest(directions, centers)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        moved = class_centers(directions, labels, len(start))
        centers = torch.where(moved.any(1, keepdim=True), moved, start)
    names = torch.tensor(_names(centers, start))
    centers, labels = centers[names.argsort()], names[labels]
    return Clusters(
        centers=centers,
        labels=labels,
        distances=_distance(directions, centers[labels]),
        center_distance=float(_distance(centers, start).mean()),
    )


def _nearest(directions: Float[Tensor, "n d"], centers: Float[Tensor, "m d"]) -> Int[Tensor, " n"]:
    from sklearn.metrics import pairwise_distances_argmin  # its import takes a second

    return torch.as_tensor(
        np.asarray(pairwise_distances_argmin(directions.numpy(), centers.numpy(), metric="cosine"))
    )


def _names(centers: Float[Tensor, "m d"], start: Float[Tensor, "m d"]) -> Sequence[int]:
    """The class of each cluster."""
    from scipy.optimize import linear_sum_assignment  # as above

    _, classes = linear_sum_assignment(-(centers @ start.T).numpy())
    return classes.tolist()


def _distance(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return (1 - (a * b).sum(-1)) / 2


def _require_finite(features: Float[Tensor, "n d"]) -> None:
    if not features.isfinite().all():
        num_lost = int((~features.isfinite().all(1)).sum())
        raise DataError(
            f"{num_lost} of {len(features)} examples have features that are not finite, so they "
            f"are in no cluster; lower --base-lr, or begin with more epochs on the source alone"
        )
