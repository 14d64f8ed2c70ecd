"""A trained model at evaluation."""

from normkit.inference.example_weight import set_example_weight
from normkit.inference.freeze import freeze_statistics, thaw_statistics

__all__ = ["freeze_statistics", "set_example_weight", "thaw_statistics"]
