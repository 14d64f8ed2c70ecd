"""Replacing the norms of a model by others, and undoing it."""

from normkit.convert.api import back_to_torch_, convert_norm, convert_norm_
from normkit.convert.placement import place_gnbn_, place_ibn_, place_xbn_
from normkit.convert.rebuild import apply_recipe
from normkit.convert.report import Change, Conversion, Left
from normkit.convert.rules import rule
from normkit.convert.source import Source, Statistics

__all__ = [
    "Change",
    "Conversion",
    "Left",
    "Source",
    "Statistics",
    "apply_recipe",
    "back_to_torch_",
    "convert_norm",
    "convert_norm_",
    "place_gnbn_",
    "place_ibn_",
    "place_xbn_",
    "rule",
]
