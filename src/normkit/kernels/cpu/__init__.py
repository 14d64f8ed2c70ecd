"""C++ kernels on torch's stable ABI, from ``csrc/``; absent where they could not be built."""

from normkit.kernels.cpu.library import (
    available,
    instruction_set,
    operators,
    require,
    warn_that_it_is_slow,
    why_not,
)

__all__ = [
    "available",
    "instruction_set",
    "operators",
    "require",
    "warn_that_it_is_slow",
    "why_not",
]
