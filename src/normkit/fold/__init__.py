"""Norms with running statistics into the weights of their neighbours."""

from normkit.fold.report import Folded, Folding
from normkit.fold.verbs import fold

__all__ = ["Folded", "Folding", "fold"]
