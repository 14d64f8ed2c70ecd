"""What is wrong with the norms of a model, and which norm to take for a batch size."""

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
