"""Networks to compare norms in: small ones of our own, torchvision's and timm's."""

from normkit.lab.models.architecture import ARCHITECTURES
from normkit.lab.models.build import BuiltModel, PlacedNorm, build_model, parse_model

__all__ = ["ARCHITECTURES", "BuiltModel", "PlacedNorm", "build_model", "parse_model"]
