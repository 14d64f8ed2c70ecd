"""Where our layers differ from torch's on purpose: each row of the page, shown side by side."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit as nk
from torch_parity.pairs import values

PAGE = Path(__file__).parents[2] / "docs" / "torch-parity.md"
X = values((4, 6, 5, 3), torch.float32)


def affine_by_default():
    assert nn.InstanceNorm2d(6).weight is None
    assert nk.InstanceNorm(6).weight is not None


def channels_come_first():
    assert nn.GroupNorm(3, 6).num_channels == 6
    assert nk.GroupNorm(6, num_groups=3).num_features == 6
    with pytest.raises(TypeError, match="all others have names"):
        nk.GroupNorm(6, 3)


def any_number_of_axes():
    with pytest.raises(ValueError, match="expected 4D input"):
        nn.BatchNorm2d(6)(X[0])
    assert nk.BatchNorm(6)(X.flatten(2)).shape == (4, 6, 15)
    assert nn.InstanceNorm2d(6)(X[0]).shape == (6, 5, 3)  # one example without a batch
    with pytest.raises(nk.InputError, match=r"num_features=6 channels and was given 5.*axis 1"):
        nk.InstanceNorm(6)(X[0])


def memory_format_stays():
    x = X.to(memory_format=torch.channels_last)
    assert not nn.InstanceNorm2d(6)(x).is_contiguous(memory_format=torch.channels_last)
    assert nk.InstanceNorm(6)(x).is_contiguous(memory_format=torch.channels_last)


def statistics_of_32_bits():
    assert nn.BatchNorm2d(6).half().running_mean.dtype == torch.float16
    layer = nk.BatchNorm(6).half()
    assert layer.running_mean.dtype == torch.float32
    layer.load_state_dict(nn.BatchNorm2d(6).half().state_dict(), assign=True)
    assert layer.running_mean.dtype == torch.float32


def any_dtype_of_parameters():
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        nn.BatchNorm2d(6).double()(X)
    assert nk.BatchNorm(6).double()(X).dtype == torch.float32


def example_weight_of_tracked_instance_norm():
    theirs = nn.InstanceNorm2d(6, track_running_stats=True).eval()
    ours = nk.InstanceNorm(6, affine=False, track_running_stats=True).eval()
    assert torch.allclose(theirs(X), X, atol=1e-4)  # by the running statistics
    assert torch.allclose(ours(X), nn.functional.instance_norm(X), atol=1e-5)  # by its own
    ours.example_weight = 0.0
    assert torch.allclose(ours(X), X, atol=1e-4)


def statistics_of_tracked_instance_norm():
    theirs = nn.InstanceNorm2d(6, track_running_stats=True, momentum=1.0)
    ours = nk.InstanceNorm(6, track_running_stats=True, momentum=1.0)
    theirs(X)
    ours(X)
    across = X.transpose(0, 1).flatten(1)
    assert torch.allclose(theirs.running_var, X.flatten(2).var(dim=2).mean(dim=0), atol=1e-5)
    assert torch.allclose(ours.running_var, across.var(dim=1), atol=1e-5)
    assert (theirs.num_batches_tracked, ours.num_batches_tracked) == (0, 1)


def empty_batches_do_not_count():
    counts = []
    for layer in (nn.BatchNorm2d(6), nk.BatchNorm(6)):
        layer(X[:0])
        counts.append(int(layer.num_batches_tracked))
    assert counts == [1, 0]
    assert nk.InstanceNorm(6)(X[:0]).shape == (0, 6, 5, 3)
    with pytest.raises(IndexError, match="out of range"):
        nn.InstanceNorm2d(6, affine=True)(X[:0])


def single_values_at_evaluation():
    one, bias = torch.ones(2, 6, 1, 1), torch.full((6,), 0.5)
    theirs, ours = nn.InstanceNorm2d(6, affine=True).eval(), nk.InstanceNorm(6).eval()
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        theirs(one)
    ours.bias = nn.Parameter(bias)
    assert torch.equal(ours(one)[0, :, 0, 0], bias)


def single_values_in_training():
    one = torch.ones(2, 6, 1, 1)
    assert nn.GroupNorm(6, 6)(one).shape == one.shape  # every group has one value
    with pytest.raises(nk.PartitionError, match="more than 1 value per statistics group"):
        nk.GroupNorm(6, num_groups=6)(one)


def one_step_moves_once():
    counts = []
    for layer in (nn.BatchNorm2d(6), nk.BatchNorm(6)):
        x = X.clone().requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        counts.append(int(layer.num_batches_tracked))
    assert counts == [2, 1]


def function_transforms_leave_buffers_alone():
    many = X[None].repeat(2, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"in-place|vmap"):
        torch.func.vmap(nn.BatchNorm2d(6))(many)
    layer = nk.BatchNorm(6)
    torch.func.vmap(layer)(many)
    assert layer.num_batches_tracked == 0


def impossible_options_are_refused():
    nn.BatchNorm2d(6, momentum=7.0, eps=-1.0)
    for option in ({"momentum": 7.0}, {"eps": -1.0}):
        with pytest.raises(nk.OptionError, match="was given"):
            nk.BatchNorm(6, **option)


def what_errors_are_and_say():
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 6"):
        nn.BatchNorm2d(6)(X[:, :5])
    with pytest.raises(ValueError, match=r"num_features=6 channels and was given 5"):
        nk.BatchNorm(6)(X[:, :5])
    with pytest.raises(RuntimeError, match=r"Long|int64|Int|not implemented"):
        nn.BatchNorm2d(6)(X.long())
    with pytest.raises(TypeError, match=r"tensor of torch\.int64; it takes torch\.float32"):
        nk.BatchNorm(6)(X.long())


def example_weight_in_the_state_dict():
    layer = nk.BatchNorm(6, example_weight=0.25)
    assert set(layer.state_dict()) - set(nn.BatchNorm2d(6).state_dict()) == {"example_weight"}
    assert not set(nk.BatchNorm(6).state_dict()) - set(nn.BatchNorm2d(6).state_dict())


def no_lazy_layers():
    assert hasattr(nn, "LazyBatchNorm2d")
    assert not [name for name in dir(nk) if name.startswith("Lazy")]


def layer_norm_is_of_maps():
    tokens = values((4, 7, 6), torch.float32)
    expected = nn.LayerNorm(6)(tokens)
    assert torch.allclose(nk.PositionalNorm(6)(tokens.mT).mT, expected, atol=1e-5)
    assert torch.allclose(nk.LayerNorm(6)(X), nn.GroupNorm(1, 6)(X), atol=1e-5)


def statistics_switched_off_leave_a_count_alone():
    counts = []
    for layer in (nn.BatchNorm2d(6), nk.BatchNorm(6)):
        layer.running_mean = layer.running_var = None
        layer(X)
        counts.append(int(layer.num_batches_tracked))
    assert counts == [1, 0]


SHOWN = [value for name, value in list(globals().items())
         if callable(value) and getattr(value, "__module__", None) == __name__]  # fmt: skip


@pytest.mark.parametrize("shown", SHOWN, ids=lambda function: function.__name__)
def test_a_difference_is_there(shown):
    copied = copy.deepcopy(X)
    shown()
    assert torch.equal(X, copied)


def test_the_page_lists_them_all():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(function.__name__ for function in SHOWN)
