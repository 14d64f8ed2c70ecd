"""Drawings of a feature map that mark which elements share statistics."""

from normkit.lab.drawing.panels import Panel, panels_of

__all__ = ["Panel", "panels_of"]
