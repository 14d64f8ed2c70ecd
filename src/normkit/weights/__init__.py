"""Weight Standardization, weight normalization and centred weight normalization."""

from normkit.weights.attach import centered_weight_norm_, standardize_weights_, weight_norm_
from normkit.weights.bake import bake_weights_
from normkit.weights.filters import Filters
from normkit.weights.functional import centered_weight_norm, standardize, weight_norm
from normkit.weights.parametrizations import (
    CenteredWeightNorm,
    Reparametrization,
    WeightNorm,
    WeightStandardization,
)
from normkit.weights.report import WeightReport

__all__ = [
    "CenteredWeightNorm",
    "Filters",
    "Reparametrization",
    "WeightNorm",
    "WeightReport",
    "WeightStandardization",
    "bake_weights_",
    "centered_weight_norm",
    "centered_weight_norm_",
    "standardize",
    "standardize_weights_",
    "weight_norm",
    "weight_norm_",
]
