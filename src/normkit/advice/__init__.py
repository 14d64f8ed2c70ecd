"""Find problems with the norms of a model, and recommend norms for a batch size."""

from normkit.advice.evidence import Evidence
from normkit.advice.finding import Finding, Findings
from normkit.advice.recommend import Recommendation, Recommendations, recommend
from normkit.advice.validate import validate

__all__ = [
    "Evidence",
    "Finding",
    "Findings",
    "Recommendation",
    "Recommendations",
    "recommend",
    "validate",
]
