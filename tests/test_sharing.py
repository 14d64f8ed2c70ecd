"""Which elements share statistics, against what the layers do when one element changes."""

from copy import deepcopy

import pytest
import torch

import normkit as nk
from cases import EVERY, randn
from normkit.core.partition import Partition
from normkit.sharing import Part, parts

SHAPE = (5, 6, 3, 3)  # the last ghost batch is smaller, and nine groups cut through channels
ROUNDING = 1e-12  # a running norm is computed around the mean of the input's segment
ELEMENTS = ((0, 0, 0, 0), (2, 3, 1, 2), (4, 5, 2, 2))
ONE_AFTER_THE_OTHER = ("gnplus", "bcn", "bcn-micro")


def spread(changed, part):
    """What changes when the statistics of everything changed so far do."""
    if part.origin == "running":
        return changed
    index = part.index(SHAPE)
    return changed | (torch.isin(index, index[changed]) & (index >= 0))


def predicted(case, layer, element):
    start = torch.zeros(SHAPE, dtype=torch.bool)
    start[element] = True
    found = parts(layer)
    if case.kind not in ONE_AFTER_THE_OTHER or case.name == "gnplus-parallel":
        return torch.stack([spread(start, part) for part in found]).any(dim=0)
    if case.name == "gnplus-batch":
        found = found[::-1]
    for part in found:
        start = spread(start, part)
    return start


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_an_element_changes_exactly_those_that_share_statistics_with_it(case, training):
    layer, x = case.make(dtype=torch.float64).train(training), randn(*SHAPE)
    before = deepcopy(layer)(x)
    for element in ELEMENTS:
        other = x.clone()
        other[element] += 2
        changed = (deepcopy(layer)(other) - before).abs() > ROUNDING
        assert torch.equal(changed, predicted(case, layer, element))


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 8), (2, 3, 2, 2, 4)], ids=str)
def test_groups_are_numbered_from_zero_without_a_gap(shape):
    for spec in ("bn", "in", "ln", "pn", "bgn:2", "ghost:2", "sn", "ibn", "gbgn:1:examples=2"):
        for part in parts(nk.build(spec, shape[1])):
            index = part.index(shape)
            assert index.shape == shape
            used = index[index >= 0].unique()
            assert used.tolist() == list(range(len(used)))


def test_channels_that_a_part_does_not_look_at_have_no_group():
    instance, batch = (part.index((2, 3, 2)) for part in parts(nk.InstanceBatchNorm(3)))
    assert instance[:, :, 0].tolist() == [[0, -1, -1], [1, -1, -1]]
    assert batch[:, :, 0].tolist() == [[-1, 0, 1], [-1, 0, 1]]


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(nk.PartitionError, match="4 groups do not divide"):
        Part(partition=Partition(num_groups=4)).index((2, 3, 3, 3))


def test_explanations_follow_the_mode():
    layer, x = nk.BatchNorm(6, example_weight=0.25), randn(4, 6, 5, 7)
    assert nk.explain(layer, x).groups == (
        "statistics over a group of 4 of 4 examples, 1 of 6 channels, 35 of 35 positions"
    )
    assert nk.explain(layer.eval(), x).groups == (
        "running statistics of 1 of 6 channels, 35 of 35 positions, with a weight of 0.75; "
        "statistics over a group of 1 of 4 examples, 1 of 6 channels, 35 of 35 positions, "
        "with a weight of 0.25"
    )
    micro = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True)
    assert "batch stage by estimates that follow a group of 4" in nk.explain(micro, x).groups
    assert "batch stage by running statistics of 1 of 6" in nk.explain(micro.eval(), x).groups
