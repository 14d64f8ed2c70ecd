"""Choose the example weight of a trained model on held-out data."""

from normkit.tune.gain import Gain
from normkit.tune.result import CurvePoint, Tuning
from normkit.tune.search import tune_example_weight

__all__ = ["CurvePoint", "Gain", "Tuning", "tune_example_weight"]
