"""Folding real networks."""

import pytest
import torch
from torch import nn

import normkit as nk
from convert.networks import WITH_BATCH_NORM, WITHOUT_BATCH_NORM, build, images, words
from fold.trained import trained
from normkit.convert.selection import find_norms

FOLDED = dict(zip(*[iter(words("""
torchvision:mobilenet_v3_small 34 torchvision:shufflenet_v2_x0_5 56 torchvision:regnet_x_400mf 71
torchvision:regnet_y_400mf 53 torchvision:resnet18 20
timm:resnet10t 14 timm:resnet14t 19 timm:resnet26d 31 timm:seresnet18 20 timm:legacy_seresnet18 20
timm:resnetblur18 20 timm:skresnet18 36 timm:resnest14d 23 timm:resnext26ts 31
timm:gcresnext26ts 31 timm:lambda_resnet26t 28 timm:dla46_c 48 timm:dla46x_c 48
timm:mobilenetv2_035 52 timm:mobilenetv3_small_050 34 timm:mobilenetv4_conv_small_035 46
timm:lcnet_035 27 timm:tinynet_e 31 timm:mnasnet_small 46 timm:resnet18 20 timm:ghostnet_050 80
timm:repghostnet_050 80 timm:regnetx_002 44 timm:regnety_002 44 timm:ese_vovnet19b_slim_dw 22
timm:hgnetv2_b0 42 timm:fasternet_t0 17 timm:starnet_s1 35 timm:inception_next_atto 16
timm:mobilevit_xxs 32 timm:mobilevitv2_050 25 timm:efficientvit_b0 26 timm:test_resnet 15
timm:test_efficientnet 13 timm:test_byobnet 14
"""))] * 2, strict=True))  # fmt: skip
"""How many norms of each network go."""
LEFT = {
    "timm:lambda_resnet26t": (9, ["getitem", "add", "AvgPool2d"]),  # values, queries: slices
    "timm:repghostnet_050": (32, ["(ReLU)", "(Identity)"]),  # on the shortcut, before a sum
    "timm:starnet_s1": (1, ["'add'"]),
}
"""How many batch norms stay, and what comes before those: nothing whose weights could take them."""


@pytest.mark.parametrize("name", WITH_BATCH_NORM + WITHOUT_BATCH_NORM)
def test_the_output_stays_and_every_norm_is_accounted_for(name):
    model, x = trained(build(name)), images(name, 1)
    names = {names[0]: norm for norm, names in find_norms(model).items()}
    with torch.no_grad():
        before = model(x)
        done = nk.fold(model, x)
        after = done.model(x)
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()
    assert len(done.folded) == int(FOLDED.get(name, 0))
    assert {row.name for row in (*done.folded, *done.left)} >= names.keys()
    tracking = [row for row in done.left if is_batch_norm(names.get(row.name))]
    count, causes = LEFT.get(name, (0, []))
    assert len(tracking) == count
    assert all(any(cause in row.why.split(", and ")[0] for cause in causes) for row in tracking)


def is_batch_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
