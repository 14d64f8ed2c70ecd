"""Pictures of a feature map, its elements marked by the statistics that they share."""

from normkit.lab.drawing.panels import Panel, panels_of

__all__ = ["Panel", "panels_of"]
