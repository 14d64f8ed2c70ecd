"""Networks to compare norms in: small ones of our own, torchvision's and timm's."""

from normkit.lab.models.architecture import ARCHITECTURES
from normkit.lab.models.build import BuiltModel, apply_arm, build_model, parse_model
from normkit.lab.models.papers import (
    CifarDenseNet121,
    CifarResNet18,
    CifarResNet50,
    CifarResNet110,
)
from normkit.lab.slots import PlacedNorm

__all__ = [
    "ARCHITECTURES",
    "BuiltModel",
    "CifarDenseNet121",
    "CifarResNet18",
    "CifarResNet50",
    "CifarResNet110",
    "PlacedNorm",
    "apply_arm",
    "build_model",
    "parse_model",
]
