"""Batches with NaN or infinity, and without anything, in every measure."""

import json
import math

import pytest
import torch
from torch import nn

import normkit as nk

NOT_FINITE = "Not finite, and not counted: "


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4)),
        *(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4)),
    )


@pytest.fixture
def pairs():
    x, target = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
    bad = x.clone()
    bad[2, 0, 1, 1] = torch.nan
    return [(x, target), (bad, target)]


def test_layers_without_a_number_are_named_and_not_counted(pairs):
    model = nn.Sequential(nn.BatchNorm2d(3), *net())
    model[2].running_var[1] = -1.0  # a file that was cut short
    clean = nk.estimation_shift(model, pairs[:1])
    assert clean.reading.startswith("Estimation shift over 1 layers: it is largest in 0 (")
    assert f"{NOT_FINITE}2 of 3 (2, 7); look for NaN" in clean.reading
    assert json.loads(clean.to_json())["layers"][2]["esm_std"] is None
    every = nk.estimation_shift(model, pairs)
    assert every.reading == clean.reading[clean.reading.index(NOT_FINITE) :].replace(
        "2 of 3 (2, 7)", "3 of 3 (0, 2, 7)"
    )


def test_differences_of_channels_are_over_what_is_finite(pairs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.ReLU(), nn.GroupNorm(1, 3))
    model[2].register_forward_pre_hook(lambda _, args: args[0] * torch.nan)
    found = nk.channel_difference(model, pairs[:1])
    assert found.mean == found.layers[0].mean
    assert math.isnan(found.layers[1].mean)
    assert f"{NOT_FINITE}1 of 2 (2)" in found.reading
    assert str(found).startswith("Channels that share statistics differ")


def test_a_step_without_a_number_is_named(pairs):
    found = nk.gradient_landscape(net(), pairs)
    assert found.reading.startswith("Over 1 steps (along_gradient")
    assert f"{NOT_FINITE}1 of 2 (2)" in found.reading


def test_weights_without_a_gradient_are_refused_or_named(pairs):
    model = net()
    nk.standardize_weights_(model)
    assert nk.lipschitz_terms(model, pairs).reading.startswith(f"{NOT_FINITE}1 of 1 (0)")
    empty = [(x[:0], target[:0]) for x, target in pairs]
    with pytest.raises(
        nk.DataError, match="no standardised weight got a gradient: the batches are"
    ):
        nk.lipschitz_terms(model[:5], empty)


def test_activations_of_nan_are_refused(pairs):
    with pytest.raises(nk.DataError, match="the input of 2 has NaN, which is neither positive nor"):
        nk.inactive_channels(net(), pairs)


MEASURES = {
    "recalibrate": nk.recalibrate,
    "in order": lambda model, batches: nk.recalibrate(model, batches, sequential=True),
    "estimation_shift": nk.estimation_shift,
    "channel_difference": nk.channel_difference,
    "inactive_channels": nk.inactive_channels,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_an_empty_batch_among_others_changes_nothing(measure, pairs):
    batches = [x for x, _ in pairs[:1]]
    model = net()[:4]
    with_empty = [batches[0][:0], *batches, batches[0][:0]]
    before, after = (measure(model, each) for each in (batches, with_empty))
    assert before.layers[0].name == after.layers[0].name
    if hasattr(before, "table"):
        assert before.table() == after.table()
    else:
        for name, value in before.layers[0].new.items():
            assert torch.equal(value, after.layers[0].new[name])


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "in order"])
def test_a_generator_is_read_once_and_then_refused(name, pairs):
    once = (x for x, _ in pairs[:1])
    assert MEASURES[name](net()[:4], once)
    with pytest.raises(nk.DataError, match="batches= gave no batch; an iterator that was used up"):
        MEASURES[name](net()[:4], once)


def test_the_training_data_are_named_where_they_are_missing(pairs):
    used = iter([])
    with pytest.raises(nk.DataError, match="train_batches= gave no batch"):
        nk.estimation_shift(net(), pairs[:1], train_batches=used)
    with pytest.raises(nk.DataError, match="given as train_batches=; it must be an iterable"):
        nk.estimation_shift(net(), pairs[:1], train_batches=pairs[0][0])


def test_sequences_of_different_lengths_are_no_channels_of_the_input():
    """Tokens ``(N, L)``: the second axis counts no channels, and changes its size."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(0, 1), nn.BatchNorm1d(4))
    batches = [torch.randint(9, (3, size)) for size in (5, 7)]
    first, row = nk.estimation_shift(model, batches, train_batches=batches).layers
    assert (first.num_values, first.esm_mean) == (0, None)
    assert row.num_values == 36
