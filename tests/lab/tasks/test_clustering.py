"""Clusters of target features: their fixed point, their names, and who is left out."""

import itertools
import math

import pytest
import torch

from normkit.errors import DataError
from normkit.lab.tasks.clustering import class_centers, spherical_clusters


def blobs(seed=0, per_class=20, spread=0.1):
    """Three bundles of directions of uneven length, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.eye(3, 4).repeat_interleave(per_class, 0)
    noise = spread * torch.randn(len(axes), 4, generator=generator)
    lengths = 0.5 + 5 * torch.rand(len(axes), 1, generator=generator)
    return (axes + noise) * lengths, torch.arange(3).repeat_interleave(per_class)


def unit(values):
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values] if length else values


def cosine(u, v):
    return sum(a * b for a, b in zip(unit(u), unit(v), strict=True))


def center_by_definition(members):
    return unit([sum(column) for column in zip(*map(unit, members), strict=True)])


def test_clusters_are_a_fixed_point_of_assigning_and_moving():
    features, _ = blobs(spread=0.6)
    start = torch.eye(3, 4) + 0.2
    found = spherical_clusters(features, start)
    rows, centers = features.double().tolist(), found.centers.tolist()
    for row, label, distance in zip(rows, found.labels, found.distances, strict=True):
        cosines = [cosine(row, center) for center in centers]
        assert int(label) == cosines.index(max(cosines))
        assert float(distance) == pytest.approx((1 - max(cosines)) / 2)
    for label, center in enumerate(centers):
        members = [row for row, own in zip(rows, found.labels, strict=True) if own == label]
        assert center == pytest.approx(center_by_definition(members))
    far = sum((1 - cosine(a, b)) / 2 for a, b in zip(centers, start.tolist(), strict=True)) / 3
    assert found.center_distance == pytest.approx(far)


def test_length_of_a_feature_does_not_count():
    features, _ = blobs()
    start = torch.eye(3, 4)
    scaled = features * torch.linspace(0.01, 100, len(features))[:, None]
    before, after = spherical_clusters(features, start), spherical_clusters(scaled, start)
    assert torch.equal(before.labels, after.labels)
    torch.testing.assert_close(before.centers, after.centers)


def test_clusters_take_the_classes_of_the_centres_that_they_start_from():
    features, labels = blobs()
    order = torch.tensor([2, 0, 1])
    found = spherical_clusters(features, torch.eye(3, 4)[order])
    assert torch.equal(order[found.labels], labels)


def test_source_centers_are_sums_of_directions():
    features, labels = blobs(per_class=4)
    found = class_centers(features, labels, 5)
    for label in range(3):
        members = features[labels == label].double().tolist()
        assert found[label].tolist() == pytest.approx(center_by_definition(members))
    assert not found[3:].any()  # classes without examples


def test_a_cluster_that_is_empty_keeps_its_centre():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0]])
    found = spherical_clusters(features, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert found.labels.tolist() == [0, 0, 0]
    assert found.centers[1].tolist() == [-1.0, 0.0]


def test_far_examples_and_then_small_classes_are_left_out():
    angles = torch.tensor([0.0, 0.1, 1.2, math.pi, math.pi + 0.05])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    found = spherical_clusters(features, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    near = found.certain(largest_distance=0.1, fewest=1)
    assert {label: kept.tolist() for label, kept in near.items()} == {0: [0, 1], 1: [3, 4]}
    all_of_them = found.certain(largest_distance=1.1, fewest=3)
    assert {label: kept.tolist() for label, kept in all_of_them.items()} == {0: [0, 1, 2]}


def test_features_that_are_not_finite_are_refused():
    features, _ = blobs()
    features[3, 1] = math.nan
    with pytest.raises(DataError, match="1 of 60 examples have features that are not finite"):
        spherical_clusters(features, torch.eye(3, 4))


def test_clusters_that_wandered_past_each_other_are_named_by_the_nearest_start():
    def directions(degrees):
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)

    features = directions([3.0, 70.0, 112.0, 132.0, 237.0, 248.0, 253.0, 342.0])
    start = directions([294.0, 273.0, 270.0])
    found = spherical_clusters(features, start)
    orders = list(itertools.permutations(range(3)))
    best = max(orders, key=lambda o: float((found.centers[list(o)] * start).sum()))
    assert best == (0, 1, 2)
    nearest = (torch.nn.functional.normalize(features.double()) @ found.centers.T).argmax(1)
    assert torch.equal(found.labels, nearest)
