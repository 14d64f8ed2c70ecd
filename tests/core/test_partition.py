"""Segments, pooling and expansion, against sets of elements counted one by one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import normkit as nk
import oracle
from cases import randn
from normkit.core.moments import Moments
from normkit.core.partition import Partition, divisors, largest_divisor
from normkit.errors import PartitionError
from normkit.kernels import reference

FEW = st.integers(1, 6)


@st.composite
def partitions(draw):
    """A feature map's shape and a partition that divides it."""
    shape = (draw(FEW), draw(FEW), *draw(st.lists(FEW, max_size=2)))
    num_groups = draw(st.sampled_from(divisors(math.prod(shape[1:]))))
    return shape, Partition(
        num_groups=num_groups, examples_per_group=draw(st.none() | st.integers(1, 7))
    )


def ids_of(shape, partition):
    """Group of every element, by the definition of a run of examples and a run of elements."""
    run = partition.examples_per_group or shape[0]
    example = torch.arange(shape[0])[:, None] // run
    size = math.prod(shape[1:]) // partition.num_groups
    return example * partition.num_groups + torch.arange(math.prod(shape[1:])) // size


@given(partitions())
def test_pooled_segments_are_the_groups_moments(drawn):
    shape, partition = drawn
    x = randn(*shape, mean=3.0)
    table = Moments(*reference.moments(x, partition.segment_size(shape)))
    groups = partition.pool(table)
    ids = ids_of(shape, partition).flatten()
    mean, var = oracle.group_moments(x.flatten(), ids)
    num_segments = table.mean.shape[1]
    for found, expected in ((groups.mean, mean), (groups.var, var)):
        spread = partition.expand(found, shape[0], num_segments).expand(shape[0], -1)
        each = spread.repeat_interleave(math.prod(shape[1:]) // num_segments, dim=1)
        assert_close(each.flatten(), expected, atol=1e-12, rtol=1e-12)


@given(partitions())
def test_segments_are_the_largest_runs_of_one_channel_and_one_group(drawn):
    shape, partition = drawn
    positions = math.prod(shape[2:])
    channel = torch.arange(math.prod(shape[1:])) // positions
    group = ids_of((1, *shape[1:]), partition)[0]
    changes = ((channel.diff() != 0) | (group.diff() != 0)).nonzero().flatten() + 1
    expected = math.gcd(positions, *changes.tolist())
    assert partition.segment_size(shape) == expected


@given(partitions())
def test_group_sizes_count_elements(drawn):
    shape, partition = drawn
    _, counts = ids_of(shape, partition).unique(return_counts=True)
    assert partition.group_sizes(shape) == (counts[0].item(), counts[-1].item())


def test_pooling_never_gives_a_negative_variance():
    mean = torch.full((4, 8), 1e4)
    groups = Partition(num_groups=2).pool(Moments(mean, torch.zeros(4, 8)))
    assert (groups.var >= 0).all()
    assert groups.var.max() < 1e-6


def test_transform_is_the_moments_of_the_result():
    x, scale, center = randn(3, 4, 50, mean=2.0), randn(3, 4, seed=1), randn(3, 4, seed=2)
    table = Moments(*reference.moments(x, 50))
    y = scale[..., None] * (x - table.mean[..., None]) + center[..., None]
    found = table.transform(scale, center)
    assert_close(found.mean, y.mean(-1))
    assert_close(found.var, y.var(-1, correction=0))


@given(st.floats(0, 1), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_blend_is_the_closed_form_of_a_mixture(weight, first, second):
    own = Moments(number(first), number(0.5))
    other = Moments(number(second), number(2.0))
    found = own.blend(other, weight)
    mean = weight * first + (1 - weight) * second
    square = weight * (0.5 + first**2) + (1 - weight) * (2.0 + second**2)
    assert_close(found.mean.item(), mean, atol=1e-9, rtol=1e-9)
    assert_close(found.var.item(), square - mean**2, atol=1e-6, rtol=1e-6)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def test_blend_is_not_negative_in_float32_far_from_zero():
    mean = torch.full((100,), 1e3) + torch.randn(100) * 0.1
    own, other = Moments(mean, mean * 0), Moments(mean + 1e-4, mean * 0)
    assert (own.blend(other, 0.3).var >= 0).all()


@given(st.integers(1, 3000), st.integers(1, 4000))
def test_largest_divisor(n, at_most):
    assert largest_divisor(n, at_most) == max(
        d for d in range(1, min(n, at_most) + 1) if n % d == 0
    )


def test_largest_divisor_of_nothing_is_refused():
    with pytest.raises(PartitionError, match="n=0, at_most=4; both must be at least 1"):
        nk.largest_divisor(0, 4)
