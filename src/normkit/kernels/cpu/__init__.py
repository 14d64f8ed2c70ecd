"""C++ kernels on torch's stable ABI, from ``csrc/``; absent where they could not be built."""

from normkit.kernels.cpu.composite import (
    Batch,
    Buffers,
    Composite,
    MomentTable,
    Slots,
    normalize_composite,
)
from normkit.kernels.cpu.functions import (
    Pooling,
    Running,
    Tables,
    normalize_given,
    normalize_pooled,
    normalize_positions,
    require,
    split_table,
)
from normkit.kernels.cpu.kinds import BatchSource, Kind
from normkit.kernels.cpu.library import (
    available,
    instruction_set,
    warn_that_it_is_slow,
    why_not,
)

__all__ = [
    "Batch",
    "BatchSource",
    "Buffers",
    "Composite",
    "Kind",
    "MomentTable",
    "Pooling",
    "Running",
    "Slots",
    "Tables",
    "available",
    "instruction_set",
    "normalize_composite",
    "normalize_given",
    "normalize_pooled",
    "normalize_positions",
    "require",
    "split_table",
    "warn_that_it_is_slow",
    "why_not",
]
