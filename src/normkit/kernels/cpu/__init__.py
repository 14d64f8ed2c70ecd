"""C++ kernels on torch's stable ABI, from ``csrc/``; absent where no compiler was at hand."""

from normkit.kernels.cpu.functions import (
    normalize_given,
    normalize_pooled,
    normalize_positions,
    require,
)
from normkit.kernels.cpu.library import available, instruction_set, why_not

__all__ = [
    "available",
    "instruction_set",
    "normalize_given",
    "normalize_pooled",
    "normalize_positions",
    "require",
    "why_not",
]
