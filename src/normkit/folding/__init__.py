"""Folding norms with running statistics into the weights of the layers before or after them."""

from normkit.folding.api import fold
from normkit.folding.report import Folded, Folding

__all__ = ["Folded", "Folding", "fold"]
