"""State dicts go both ways, in every way that torch's loads them."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

import normkit as nk
from torch_parity.pairs import BATCH, PAIRS, POSITIONS, values

EVERY = (*PAIRS, POSITIONS)


def equal(first, second):
    """Keys, values and dtypes of two state dicts."""
    assert list(first) == list(second)
    return all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype
               for n in first)  # fmt: skip


def trained(pair):
    """Both layers, ours after three batches."""
    theirs, ours = pair.make()
    for seed in range(3):
        ours(values(pair.shape, torch.float32, seed))
    return theirs, ours


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_both_ways(pair, assign):
    theirs, ours = trained(pair)
    state = ours.state_dict()
    assert str(theirs.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert equal(theirs.state_dict(), state)
    other = pair.ours(6)
    other.load_state_dict(theirs.state_dict(), assign=assign)
    assert equal(other.state_dict(), state)


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_the_same_metadata(pair):
    theirs, ours = pair.make()
    versions = [layer.state_dict()._metadata[""].get("version") for layer in (theirs, ours)]
    if pair.tracks:
        assert versions[0] == versions[1] == 2


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_before_version_2_there_was_no_count(pair):
    """With old metadata, and without any: the count is left as it is."""
    for metadata in ({"": {"version": 1}}, None):
        layers = [copy.deepcopy(layer) for layer in trained(pair)]
        state = OrderedDict(layers[0].state_dict())
        del state["num_batches_tracked"]
        if metadata:
            state._metadata = metadata
        for layer in layers:
            layer.num_batches_tracked.fill_(7)
            layer.load_state_dict(state)
        assert layers[0].num_batches_tracked == layers[1].num_batches_tracked


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_a_state_dict_that_does_not_name_the_layer_leaves_its_count_alone(pair):
    for index, norm in enumerate(trained(pair)):
        network = nn.Sequential(nn.Linear(2, 2), norm)
        count = 3 * index
        norm.num_batches_tracked.fill_(count)
        for state in ({}, nn.Sequential(nn.Linear(2, 2)).state_dict()):
            result = network.load_state_dict(state, strict=False)
            assert norm.num_batches_tracked == count
            assert "1.running_mean" in result.missing_keys


@pytest.mark.parametrize("key", ["weight", "running_mean", "running_var"])
@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_a_part_is_loaded_if_that_is_allowed(pair, key):
    results = []
    for layer in pair.make():
        result = layer.load_state_dict({key: torch.full((6,), 3.0)}, strict=False)
        results.append((sorted(result.missing_keys), result.unexpected_keys))
        assert layer.state_dict()[key].tolist() == [3.0] * 6
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict({key: torch.full((6,), 3.0)})
    assert results[0] == results[1]


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_other_shapes_and_other_keys_are_refused(pair):
    for layer in pair.make():
        before = copy.deepcopy(layer.state_dict())
        wrong = before | {"weight": torch.ones(5)}
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict(wrong)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*gamma"):
            layer.load_state_dict(before | {"gamma": torch.ones(6)})
        assert equal(layer.state_dict(), before)


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_without_statistics_those_of_a_checkpoint_are_unexpected(pair):
    state = pair.theirs(6).state_dict()
    for layer in pair.make(track_running_stats=False):
        assert list(layer.state_dict()) == ["weight", "bias"]
        with pytest.raises(RuntimeError, match=r"Unexpected key.*running_mean"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_prefixes_and_keep_vars(pair):
    for layer in pair.make():
        state = layer.state_dict(prefix="norm.", keep_vars=True)
        assert state["norm.weight"] is layer.weight
        assert all(name.startswith("norm.") for name in state)
        kept = layer.state_dict(keep_vars=False)["weight"]
        assert not kept.requires_grad
        assert kept.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_hooks_of_state_dicts(pair):
    seen = []
    for layer in pair.make():
        layer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
        layer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
        layer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
        layer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
        layer.load_state_dict(layer.state_dict())
    assert seen == ["saving", "saved", "loading", "loaded"] * 2


@pytest.mark.parametrize("pair", EVERY, ids=str)
def test_through_a_file(pair):
    _, ours = trained(pair)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs = pair.theirs(6)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert equal(theirs.state_dict(), ours.state_dict())


@pytest.mark.parametrize("pair", BATCH, ids=str)
def test_a_loaded_count_goes_on(pair):
    theirs, ours = pair.make(momentum=None)
    state = copy.deepcopy(theirs.state_dict()) | {"num_batches_tracked": torch.tensor(9)}
    for layer in (theirs, ours):
        layer.load_state_dict(state)
        layer(values(pair.shape, torch.float32))
        assert layer.num_batches_tracked == 10
    assert torch.allclose(ours.running_mean, theirs.running_mean)


def test_a_meta_layer_takes_a_state_dict_by_assignment():
    state = nn.BatchNorm2d(6).state_dict()
    for kind in (nn.BatchNorm2d, nk.BatchNorm):
        layer = kind(6, device="meta")
        layer.load_state_dict(state, assign=True)
        assert {t.device.type for t in [*layer.parameters(), *layer.buffers()]} == {"cpu"}
        layer(values((4, 6, 5, 3), torch.float32))


def test_buffers_that_are_copied_into_are_those_that_are_used():
    for kind in (nn.BatchNorm2d, nk.BatchNorm):
        layer = kind(6).eval()
        layer.running_mean.copy_(torch.full((6,), 2.0))
        layer.running_var.copy_(torch.full((6,), 4.0))
        y = layer(torch.full((1, 6, 1, 1), 4.0))
        assert torch.allclose(y, torch.ones(()), atol=1e-4)
        layer.running_mean = torch.full((6,), 4.0)
        assert torch.allclose(layer(torch.full((1, 6, 1, 1), 4.0)), torch.zeros(()), atol=1e-4)
