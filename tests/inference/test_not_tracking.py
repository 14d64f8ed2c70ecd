"""``track_running_stats`` switched off after building: evaluate by buffers, leave them alone."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk

KINDS = {"torch's": nn.BatchNorm2d, "ours": nk.BatchNorm}


@pytest.fixture(params=KINDS)
def model(request):
    """Two norms that have statistics, and no longer follow the data."""
    torch.manual_seed(0)
    kind = KINDS[request.param]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), kind(4))
    for _ in range(3):
        net(torch.randn(8, 3, 6, 6) + 2)
    for layer in (net[1], net[3]):
        layer.track_running_stats = False
    return net.eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 6, 6) * 2 for _ in range(2)]


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_still(model, before):
    found = buffers(model)
    assert found.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in found.items())


def test_recalibration_leaves_them_as_frozen_and_evaluates_by_them(model, batches):
    model.append(nn.BatchNorm2d(4)).eval()
    before = buffers(model)
    with torch.no_grad():
        values = torch.cat([model[:4](x) for x in batches]).double().movedim(1, 0).flatten(1)
    for sequential in (False, True):
        patch = nk.recalibrate(model, batches, sequential=sequential)
        assert [each.name for each in patch.left] == ["1", "3"]
        assert "its track_running_stats is off, so it is frozen" in patch.left[0].why
        (row,) = patch.layers
        assert_close(row.new["running_mean"].double(), values.mean(1), rtol=1e-5, atol=1e-6)
    assert_still(model, before)
    with pytest.raises(nk.OptionError, match="no layer to measure: 1: its track_running_stats is"):
        nk.recalibrate(model[:4].eval(), batches)


def test_the_shift_is_from_the_buffers(model, batches):
    with torch.no_grad():
        values = torch.cat([model[:1](x) for x in batches]).double().movedim(1, 0).flatten(1)
    rows = nk.estimation_shift(model, batches).layers
    assert [row.name for row in rows] == ["input", "1", "3"]
    distance = (model[1].running_mean.double() - values.mean(1)).norm()
    assert rows[1].esm_mean == pytest.approx(float(distance), rel=1e-6)


def test_freezing_makes_training_normalise_by_the_buffers_too(model, batches):
    before, y = buffers(model), model(batches[0])
    assert not torch.allclose(model.train()(batches[0]), y)  # as torch: by the batch
    assert nk.freeze_statistics(model) == ("1", "3")
    assert_close(model(batches[0]), y)
    nk.thaw_statistics(model)
    assert not torch.allclose(model(batches[0]), y)
    assert_still(model, before)


def test_statistics_that_never_move_do_not_wait(model, batches):
    before = buffers(model)
    model.append(nn.BatchNorm2d(4)).train()
    with nk.accumulate_statistics(model, 1) as waiting:
        assert waiting.names == ("4",)
        assert "track_running_stats is off" in waiting.left["1"]
        model(batches[0])
    assert model[4].num_batches_tracked == 1
    assert_still(model[:4], before)


def test_a_probe_compares_with_the_buffers_and_noise_ends_at_them(model, batches):
    before = buffers(model)
    with nk.Probe(model.train(), every=1) as probe:
        model(batches[0]).sum().backward()
        record = probe.step()
    values = model[0](batches[0]).detach().double().movedim(1, 0).flatten(1)
    row = next(row for row in record.layers if row.name == "1")
    distance = (before["1.running_mean"].double() - values.mean(1)).norm()
    assert row.shift_mean == pytest.approx(float(distance), rel=1e-6)
    with nk.disturb_statistics(model.eval(), 0.5) as names:
        assert names == ("1", "3")
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert_still(model, before)


def test_the_doctor_measures_them_and_says_that_they_stand_still(model, batches):
    model += nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    before = buffers(model)
    target = torch.arange(8) % 4
    with torch.no_grad():
        model[5].weight.mul_(20)
    pairs = [(x + 30, target) for x in batches] * 4
    found = nk.diagnose(model, pairs, pairs)
    assert any(cause.name == "frozen at other statistics" for cause in found.causes)
    assert "track_running_stats off" in found.causes[0].what
    assert_still(model, before)
    assert not model[1].track_running_stats


def test_instance_norms_that_no_longer_track_evaluate_without_statistics(batches):
    """Torch's then normalise each example by itself, in any mode."""
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    layer.track_running_stats = False
    model = nn.Sequential(layer, nn.BatchNorm2d(3))
    found = nk.estimation_shift(model, batches)
    assert [row.name for row in found.layers] == ["input", "1"]
    assert "it normalises by its input alone" in found.left[0].why
    assert "it normalises by its input alone" in nk.recalibrate(model, batches).left[0].why
