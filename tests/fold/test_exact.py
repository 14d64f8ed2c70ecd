"""Folded chains against their definitions: every layer, on either side, every norm."""

import pytest
import torch
from torch import nn

import normkit as nk
from convert.networks import torchvision
from fold.definitions import by_channel, by_group, by_pooled_group, group_norm
from fold.trained import model_of, randn

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
MAPS = {1: (2, 6, 9), 2: (2, 6, 7, 5), 3: (2, 6, 4, 5, 3)}  # no two sizes are alike
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAYERS = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3, padding=1),
    "conv1d without bias": lambda: nn.Conv1d(6, 8, 3, bias=False),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2), stride=2, dilation=(1, 2)),
    "conv2d in groups": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False),
    "conv3d": lambda: nn.Conv3d(6, 4, 2, groups=2),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, bias=False),
    "transposed 2d in groups": lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, groups=3),
    "transposed 3d": lambda: nn.ConvTranspose3d(6, 4, 2, groups=2),
}
BEHIND = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d without bias": lambda: nn.Conv2d(6, 8, 3, stride=2, bias=False),
    "conv2d in groups": lambda: nn.Conv2d(6, 4, 3, groups=2, padding="valid"),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "pointwise, padding same": lambda: nn.Conv2d(6, 8, 1, padding="same"),
    "circular padding": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
    "reflected padding, same": lambda: nn.Conv1d(6, 8, 3, padding="same", padding_mode="reflect"),
    "conv3d": lambda: nn.Conv3d(6, 4, 2, groups=2),
    "transposed, pointwise": lambda: nn.ConvTranspose2d(6, 9, 1, groups=3, padding=1),
}


def values(norm, size):
    """Everything that decides a norm, with the scale 1 and the shift 0 where it learns none."""
    weight = torch.ones(size).double() if norm.weight is None else norm.weight.detach()
    bias = torch.zeros(size).double() if norm.bias is None else norm.bias.detach()
    return norm.running_mean, norm.running_var, weight, bias, norm.eps


def check(model, x, expected, index):
    """The folded chain does what the definition says, with an identity in the norm's place."""
    assert (model(x) - expected).abs().max() < 1e-9  # the definition is this model's
    done = nk.fold(model, x)
    torch.testing.assert_close(done.model(x), expected, **CLOSE)
    assert isinstance(done.model[index], nn.Identity)
    assert [row.name for row in done.folded] == [str(index)]
    assert done.left == ()
    assert done.difference < 1e-11


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_into_the_layer_before(name, affine):
    layer = LAYERS[name]().double()
    dims = layer.weight.ndim - 2
    x = randn(*MAPS[dims])
    norm = NORMS[dims](layer(x).shape[1], affine=affine, eps=1e-2)
    model = model_of(layer, norm)
    check(model, x, by_channel(layer(x).detach(), *values(norm, norm.num_features)), 1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", BEHIND)
def test_into_the_layer_behind(name, affine):
    layer = BEHIND[name]().double()
    dims = layer.weight.ndim - 2
    norm = NORMS[dims](6, affine=affine, eps=1e-2)
    model, x = model_of(norm, layer), randn(*MAPS[dims])
    check(model, x, layer(by_channel(x, *values(norm, 6))).detach(), 0)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Conv2d(6, 4, 3, padding=1)]
)
def test_a_scale_without_a_shift_may_meet_padding(layer):
    norm = nn.BatchNorm2d(6, affine=False)
    model, x = model_of(norm, layer), randn(*MAPS[2])
    norm.running_mean.zero_()
    check(model, x, layer(by_channel(x, *values(norm, 6))).detach(), 0)


def test_a_linear_layer_on_either_side():
    layer, norm, x = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), randn(7, 6)
    model = model_of(layer, norm)
    check(model, x, by_channel(layer(x).detach(), *values(norm, 5)), 1)
    layer, norm = nn.Linear(6, 5), nn.BatchNorm1d(6)
    model = model_of(norm, layer)
    check(model, x, layer(by_channel(x, *values(norm, 6))).detach(), 0)


def test_through_a_flattened_map():
    norm, layer, x = nn.BatchNorm2d(6), nn.Linear(6 * 35, 4), randn(*MAPS[2])
    model = model_of(norm, nn.Flatten(), layer)
    check(model, x, layer(by_channel(x, *values(norm, 6)).flatten(1)).detach(), 0)
    layer, norm, x = nn.Linear(3, 6 * 35), nn.BatchNorm2d(6), randn(2, 3)
    model = model_of(layer, nn.Unflatten(1, (6, 7, 5)), norm)
    map_ = layer(x).detach().reshape(2, 6, 7, 5)
    check(model, x, by_channel(map_, *values(norm, 6)), 2)


OURS = {
    "batch": (lambda: nk.BatchNorm(8), by_channel),
    "ghost": (lambda: nk.GhostBatchNorm(8, ghost_batch_size=2), by_channel),
    "gbgn": (lambda: nk.GeneralBatchGroupNorm(8, num_groups=4), by_pooled_group),
    "tracked group": (
        lambda: nk.GroupNorm(8, num_groups=4, track_running_stats=True, example_weight=0),
        by_pooled_group,
    ),
    "tracked instance": (
        lambda: nk.InstanceNorm(8, track_running_stats=True, example_weight=0),
        by_channel,
    ),
    "bgn": (lambda: nk.BatchGroupNorm(8, num_groups=4), by_group),
    "bgn by channel": (lambda: nk.BatchGroupNorm(8, num_groups=8), by_channel),
    "torch's tracked instance": (
        lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        by_channel,
    ),
    "synchronised": (lambda: nn.SyncBatchNorm(8), by_channel),
}


@pytest.mark.parametrize("name", OURS)
def test_norms_by_running_statistics(name):
    make, definition = OURS[name]
    layer, norm, x = nn.Conv2d(6, 8, 3), make(), randn(*MAPS[2])
    model = model_of(layer, norm)
    groups = (4,) if definition is by_pooled_group else ()
    check(model, x, definition(layer(x).detach(), *values(norm, 8), *groups), 1)


def test_tracked_layer_norm_pools_all_channels():
    norm = nk.LayerNorm(8, track_running_stats=True, example_weight=0)
    layer, x = nn.Conv2d(6, 8, 3), randn(*MAPS[2])
    model = model_of(layer, norm)
    check(model, x, by_pooled_group(layer(x).detach(), *values(norm, 8), 1), 1)


@pytest.mark.parametrize("micro_batch", [False, True])
def test_of_batch_channel_norm_the_channel_stage_stays(micro_batch):
    norm = nk.BatchChannelNorm(8, num_groups=2, micro_batch=micro_batch)
    layer, x = nn.Conv2d(6, 8, 3), randn(*MAPS[2])
    model = model_of(layer, norm)
    nn.init.uniform_(norm.channel.weight)
    nn.init.uniform_(norm.channel.bias)
    between = by_channel(layer(x).detach(), *values(norm.batch, 8))
    stage = norm.channel
    expected = group_norm(between, 2, stage.weight.detach(), stage.bias.detach(), stage.eps)
    done = nk.fold(model, x)
    torch.testing.assert_close(done.model(x), expected, **CLOSE)
    assert done.folded[0].stays == "ChannelStage"
    kept = [key for key in done.model.state_dict() if key.startswith("1.")]
    assert kept == ["1.channel.weight", "1.channel.bias"]
    assert done.model(x[:0]).shape == model(x[:0]).shape


def test_channels_in_the_last_axis():
    before = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    norm = nk.convert_norm(before, "bn").model[1]  # over (N, 9, 8), channels last
    layer, x = nn.Linear(6, 8), randn(2, 9, 6)
    model = model_of(layer, norm)
    expected = by_channel(layer(x).detach().movedim(-1, 1), *values(norm, 8)).movedim(1, -1)
    check(model, x, expected, 1)


def test_a_frozen_norm():
    norm = torchvision.ops.FrozenBatchNorm2d(8)
    layer, x = nn.Conv2d(6, 8, 3), randn(*MAPS[2])
    model = model_of(layer, norm)
    check(model, x, by_channel(layer(x).detach(), *values(norm, 8)), 1)
