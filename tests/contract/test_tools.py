"""Effects of tools that look for torch's classes on our layers: the table of docs/others.md."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.func import replace_all_batch_norm_modules_
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import normkit as nk
from cases import MAIN, TOLERANCE, randn
from normkit.convert.adapters import adapt_
from normkit.convert.source import Activation
from normkit.errors import OptionError
from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()

from timm.layers import convert_splitbn_model  # noqa: E402
from timm.layers import convert_sync_batchnorm as convert_timms  # noqa: E402
from timm.optim import param_groups_weight_decay  # noqa: E402 - after the missing operators
from timm.utils.model import freeze_batch_norm_2d  # noqa: E402
from torchvision.ops._utils import split_normalization_params  # noqa: E402

OTHERS = [case for case in MAIN if case.layer is not nk.BatchNorm]
IMAGES = randn(4, 3, 7, 5, dtype=torch.float32)


def net(norm):
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU())


def trained(norm):
    model = net(norm)
    model(IMAGES)
    return model.eval()


def test_only_batch_norm_is_torchs():
    assert isinstance(nk.BatchNorm(6), _BatchNorm)
    for case in OTHERS:
        assert not any(isinstance(m, _BatchNorm) for m in case.make().modules())


def test_update_bn_moves_batch_norm():
    ours, theirs = net(nk.BatchNorm(6)), net(nn.BatchNorm2d(6))
    theirs.load_state_dict(ours.state_dict())
    batches = [randn(4, 3, 7, 5, seed=s, mean=3.0, dtype=torch.float32) for s in range(3)]
    for model in (ours, theirs):
        update_bn(batches, model)
        assert model[1].momentum == 0.1
    for name, buffer in theirs.named_buffers():
        assert_close(ours.get_buffer(name), buffer)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_the_others_are_passed_by(case):
    before = {k: v.clone() for k, v in net(case.make()).named_buffers()}
    model = net(case.make())
    update_bn([IMAGES], model)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is case.layer
    assert type(freeze_batch_norm_2d(model)[1]) is case.layer
    replace_all_batch_norm_modules_(model)
    assert model.train()(IMAGES).shape == (4, 6, 5, 3)
    assert not split_normalization_params(model)[0]
    decayed = param_groups_weight_decay(model, 0.1)[1]["params"]
    assert [p.ndim for p in decayed] == [4]


def test_conversion_to_sync_batch_norm_keeps_values():
    layer = trained(nk.BatchNorm(6, eps=0.25))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(synchronized[1]) is nn.SyncBatchNorm
    assert synchronized[1].eps == 0.25
    assert_close(synchronized(IMAGES), layer(IMAGES))


REBUILDERS = {
    "torch's": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm's": convert_timms,
    "split": convert_splitbn_model,
    "folded into a convolution": lambda model: fuse_conv_bn_eval(nn.Conv2d(3, 6, 3).eval(), model),
    "folded into a linear map": lambda model: fuse_linear_bn_eval(nn.Linear(3, 6).eval(), model),
}


@pytest.mark.parametrize("name", REBUILDERS)
def test_who_would_lose_an_activation_is_refused(name):
    rebuild, layer = REBUILDERS[name], nk.BatchNorm(6, activation="relu").eval()
    for _ in range(2):  # frozen too
        with pytest.raises(OptionError, match=r"would make a layer without its activation='relu'"):
            rebuild(layer)
        nk.freeze_statistics(layer)
    layer.activation = None
    assert isinstance(rebuild(layer), nn.Module)
    assert layer.eps == 1e-5


@pytest.mark.parametrize("name", ["torch's", "folded into a convolution"])
def test_what_a_conversion_has_added_is_not_lost_either(name):
    act = Activation(nn.Identity(), nn.Mish())
    adapted = adapt_(nk.BatchNorm(6).eval(), act, channels_last=False)
    with pytest.raises(OptionError, match=r"without its activation module; normkit\.synchronize_"):
        REBUILDERS[name](adapted)
    adapted = adapt_(nk.BatchNorm(6).eval(), act, channels_last=True)
    with pytest.raises(OptionError, match="its last axis of channels and activation module"):
        REBUILDERS[name](adapted)


def test_fusing():
    model = trained(nk.BatchNorm(6))
    fused = fuse_conv_bn_eval(model[0], model[1])
    assert_close(fused(IMAGES), model[1](model[0](IMAGES)), **TOLERANCE[torch.float32])
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(model, [["0", "1"]])
    assert isinstance(fuse(model).get_submodule("1"), nk.BatchNorm)
    assert nk.fold(model, IMAGES).model(IMAGES).shape == (4, 6, 5, 3)


def test_batch_norm_in_other_tools():
    model = net(nk.BatchNorm(6))
    assert type(freeze_batch_norm_2d(model)[1]) is nk.BatchNorm
    assert len(split_normalization_params(model)[0]) == 2
    replace_all_batch_norm_modules_(model)
    assert model[1].running_mean is None
    assert model(IMAGES).shape == (4, 6, 5, 3)


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_classes_of_torchs_other_norms_are_found_after_the_way_back_only(case):
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
    model = net(case.make())
    assert not isinstance(model[1], kinds)
    if case.layer in (nk.GroupNorm, nk.LayerNorm, nk.InstanceNorm) and not case.options.get(
        "track_running_stats"
    ):
        nk.back_to_torch_(model, example_input=IMAGES)
        assert isinstance(model[1], kinds)


def test_torchscript_is_refused_with_the_way_out():
    with pytest.raises(OptionError, match=r"use torch.export, or torch.jit.trace in evaluation"):
        torch.jit.script(net(nk.GroupNorm(6, num_groups=2)))
