"""What recalibration refuses, and what it says."""

import pytest
from torch import nn

import normkit as nk
from inference.net import SIZES, data, net


def test_nothing_to_measure_is_an_error():
    with pytest.raises(nk.OptionError, match=r"Conv2d has no layer with running statistics$"):
        nk.recalibrate(nn.Conv2d(3, 6, 3), [data()])
    with pytest.raises(nk.OptionError, match=r"chooses none of the 1 layers; they are: 1"):
        nk.recalibrate(net(), [data()], where=lambda _, name: name == "bn")
    model = net()
    nk.freeze_statistics(model)
    with pytest.raises(nk.OptionError, match="no layer to measure: 1: it is frozen"):
        nk.recalibrate(model, [data()])
    with pytest.raises(nk.OptionError, match=r"'1'.*does not know its number of channels"):
        nk.recalibrate(nn.Sequential(nn.Identity(), nn.LazyBatchNorm2d()), [data()])


def test_batches_that_cannot_be_measured_are_refused():
    model, x = net(), data()
    for batches in ([], iter([])):
        with pytest.raises(
            nk.DataError, match=r"batches= gave no batch; an iterator that was used"
        ):
            nk.recalibrate(model, batches)
    with pytest.raises(nk.DataError, match="2 batches have brought no value to any of the 1 lay"):
        nk.recalibrate(model, [x[:0], x[:0]])
    with pytest.raises(
        nk.DataError, match="list_iterator was given, which yields its batches only once"
    ):
        nk.recalibrate(model, iter([x]), sequential=True)
    with pytest.raises(nk.DataError, match=r"Tensor of shape .* was given as batches"):
        nk.recalibrate(model, x)
    with pytest.raises(nk.OptionError, match=r"max_batches=0"):
        nk.recalibrate(model, [x], max_batches=0)
    with pytest.raises(nk.DataError, match="'1' has statistics that are not finite"):
        nk.recalibrate(model, [x, x * float("nan")])
    with pytest.raises(nk.OptionError, match=r"torch\.distributed is not initialised"):
        nk.recalibrate(model, [x], group=object())


def test_single_values_are_refused_where_they_have_no_variance():
    plain, x = nn.BatchNorm1d(3), data()[..., 0, 0]
    with pytest.raises(nk.InputError, match=r"'' got .* shape \(1, 3\): one value for each"):
        nk.recalibrate(plain, x.split(SIZES))
    assert nk.recalibrate(plain, x.split(SIZES), sequential=True).num_batches == 3
    with pytest.raises(nk.DataError, match="'' got a single value for each of its statistics"):
        nk.recalibrate(plain, [x[:1]], sequential=True)
    ghost = nk.GhostBatchNorm(3, ghost_batch_size=8)
    with pytest.raises(nk.PartitionError, match="layer '' expected more than 1 value per statist"):
        nk.recalibrate(ghost, [x])
    instance = nn.InstanceNorm2d(3, track_running_stats=True)
    with pytest.raises(nk.InputError, match="a channel of an example is a single value"):
        nk.recalibrate(instance, [data()[..., :1, :1]], sequential=True)
