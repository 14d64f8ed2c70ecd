"""C++ kernels on torch's stable ABI, from ``csrc/``; absent where no compiler was at hand."""

from normkit.kernels.cpu.library import available, instruction_set, operators, require, why_not

__all__ = ["available", "instruction_set", "operators", "require", "why_not"]
