"""Choose the example weight of a trained model on held-out data."""

from normkit.tune.curve import WeightCurve, example_weight_curve
from normkit.tune.gain import Gain
from normkit.tune.result import CurvePoint, Tuning
from normkit.tune.search import tune_example_weight

__all__ = [
    "CurvePoint",
    "Gain",
    "Tuning",
    "WeightCurve",
    "example_weight_curve",
    "tune_example_weight",
]
