"""Norms with running statistics into the weights of their neighbours."""

from normkit.folding.report import Folded, Folding
from normkit.folding.verbs import fold

__all__ = ["Folded", "Folding", "fold"]
