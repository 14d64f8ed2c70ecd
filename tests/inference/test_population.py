"""Merged statistics against those of the concatenated data, in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import group_norm

import normkit as nk
from normkit.inference.population import SMALL, Population


@pytest.fixture(autouse=True, params=["formula", "kernel", "small"])
def _way(request, monkeypatch):
    """Take inputs by the plain formula, by the kernel, and as the small ones that they are."""
    kernels = "reference" if request.param == "formula" else "cpu"
    monkeypatch.setattr(
        "normkit.inference.population.SMALL", SMALL if request.param == "small" else 0
    )
    with nk.use_kernels(kernels):
        yield


def data(offset=0.0):
    torch.manual_seed(0)
    return torch.randn(17, 6, 5, 7) * torch.rand(6, 1, 1) + offset


def of_runs(x, num_runs):
    """Mean, biased and unbiased variance of equal runs of every example, by definition."""
    runs = x.double().reshape(len(x), num_runs, -1).movedim(1, 0).reshape(num_runs, -1)
    mean = runs.sum(1) / runs.shape[1]
    squares = (runs - mean[:, None]).square().sum(1)
    return mean, squares / runs.shape[1], squares / (runs.shape[1] - 1)


LAYERS = {
    "torch": (nn.BatchNorm2d(6), lambda x: of_runs(x, 6)),
    "bn": (nk.BatchNorm(6), lambda x: of_runs(x, 6)),
    "tracked gn": (
        nk.GroupNorm(6, num_groups=3, track_running_stats=True),
        lambda x: of_runs(x, 6),
    ),
    "ghost": (nk.GhostBatchNorm(6, ghost_batch_size=2), lambda x: of_runs(x, 6)),
    "bgn, groups of channels": (nk.BatchGroupNorm(6, num_groups=2), lambda x: of_runs(x, 2)),
    "bgn, parts of channels": (nk.BatchGroupNorm(6, num_groups=14), lambda x: of_runs(x, 14)),
    "gnplus, of gn's output": (
        nk.GroupNormPlus(6, num_groups=3),
        lambda x: of_runs(group_norm(x.double(), 3), 6),
    ),
    "gnplus, of the input": (
        nk.GroupNormPlus(6, num_groups=3, order="parallel"),
        lambda x: of_runs(x, 6),
    ),
}


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_all_data_at_once(name, offset):
    layer, definition = LAYERS[name]
    x = data(offset)
    population = Population(layer)
    for batch in x.split([8, 8, 1]):
        population.add(batch)
    mean, biased, unbiased = definition(x)
    for found, expected in [
        (population.moments.mean, mean),
        (population.moments.var, biased),
        (population.buffers.var, unbiased),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_estimates_of_micro_batches_are_biased():
    layer = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True)
    population = Population(layer.batch)
    population.add(data())
    torch.testing.assert_close(population.buffers.var, of_runs(data(), 6)[1])


def test_the_order_of_the_batches_does_not_matter():
    found = []
    for batches in itertools.permutations(data(10.0).split([8, 8, 1])):
        population = Population(nn.BatchNorm2d(6))
        for batch in batches:
            population.add(batch)
        found.append(population.buffers.var)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=0)


def test_layouts_and_empty_batches_change_nothing():
    x = data()
    population = Population(nn.BatchNorm2d(6))
    population.add(x[:0])
    population.add(x.to(memory_format=torch.channels_last))
    population.add(x[:0])
    assert population.count == 17 * 35
    torch.testing.assert_close(population.moments.mean, of_runs(x, 6)[0])


def test_inputs_without_positions_and_of_16_bits_are_taken():
    x = data()[..., 0, 0].bfloat16()
    population = Population(nn.BatchNorm1d(6))
    population.add(x)
    torch.testing.assert_close(population.buffers.var, of_runs(x, 6)[2])
