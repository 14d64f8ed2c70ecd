"""The error that stops a benchmark."""

from normkit.errors import NormError


class BenchError(NormError, ArithmeticError):
    """A layer and its peer do not compute the same, so their times must not be compared."""
