"""Networks for comparing norms: small ones of our own, torchvision's and timm's."""

from normkit.lab.extra import lab_packages

with lab_packages():
    from normkit.lab.models.architecture import ARCHITECTURES
    from normkit.lab.models.build import BuiltModel, apply_arm, build_model, parse_model
    from normkit.lab.models.cifar import CifarDenseNet, CifarResNet, ThinResNet, WideResNet
    from normkit.lab.models.darts import Darts
    from normkit.lab.models.resnet12 import ResNet12
    from normkit.lab.slots import PlacedNorm

__all__ = [
    "ARCHITECTURES",
    "BuiltModel",
    "CifarDenseNet",
    "CifarResNet",
    "Darts",
    "PlacedNorm",
    "ResNet12",
    "ThinResNet",
    "WideResNet",
    "apply_arm",
    "build_model",
    "parse_model",
]
