"""Networks of torchvision and timm, untrained; at least forty with batch norms, small and fast."""

import torch

from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()
import timm  # noqa: E402 - its operators must be there first
import torchvision  # noqa: E402


def words(text):
    return text.split()


WITH_BATCH_NORM = words("""
torchvision:mobilenet_v3_small torchvision:shufflenet_v2_x0_5 torchvision:regnet_x_400mf
torchvision:regnet_y_400mf torchvision:resnet18
timm:resnet10t timm:resnet14t timm:resnet26d timm:seresnet18 timm:legacy_seresnet18
timm:resnetblur18 timm:skresnet18 timm:resnest14d timm:resnext26ts timm:gcresnext26ts
timm:lambda_resnet26t timm:dla46_c timm:dla46x_c timm:mobilenetv2_035 timm:mobilenetv3_small_050
timm:mobilenetv4_conv_small_035 timm:lcnet_035 timm:tinynet_e timm:mnasnet_small timm:resnet18
timm:ghostnet_050 timm:repghostnet_050 timm:regnetx_002 timm:regnety_002
timm:ese_vovnet19b_slim_dw timm:hgnetv2_b0 timm:fasternet_t0 timm:starnet_s1
timm:inception_next_atto timm:mobilevit_xxs timm:mobilevitv2_050 timm:efficientvit_b0
timm:test_resnet timm:test_efficientnet timm:test_byobnet
""")
WITHOUT_BATCH_NORM = words("""
timm:convnext_atto timm:edgenext_xx_small timm:test_efficientnet_gn
timm:test_efficientnet_ln timm:test_convnext timm:test_mambaout timm:test_vit
""")
SIZES = {
    "timm:dla46_c": 64,
    "timm:dla46x_c": 64,
    "timm:ese_vovnet19b_slim_dw": 64,  # at 48 its last map has one position: chaotic
    "timm:test_vit": 160,
}
"""Height and width of inputs where 48 do not fit."""


def build(name):
    library, _, inner = name.partition(":")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "timm":
            return timm.create_model(inner, num_classes=10)
        return torchvision.models.get_model(inner, weights=None, num_classes=10)


def images(name, count):
    size = SIZES.get(name, 48)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
