"""What is wrong with the norms of a model, and which norm to take for a batch size."""

from normkit.advice.finding import Finding, Findings
from normkit.advice.validate import validate

__all__ = ["Finding", "Findings", "validate"]
