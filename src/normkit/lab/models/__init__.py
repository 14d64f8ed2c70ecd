"""Networks to compare norms in: small ones of our own, torchvision's and timm's."""

from normkit.lab.models.architecture import ARCHITECTURES
from normkit.lab.models.build import BuiltModel, apply_arm, build_model, parse_model
from normkit.lab.models.cifar import CifarDenseNet, CifarResNet, ThinResNet
from normkit.lab.models.darts import Darts
from normkit.lab.slots import PlacedNorm

__all__ = [
    "ARCHITECTURES",
    "BuiltModel",
    "CifarDenseNet",
    "CifarResNet",
    "Darts",
    "PlacedNorm",
    "ThinResNet",
    "apply_arm",
    "build_model",
    "parse_model",
]
