"""Triton kernels for the GPU; under ``TRITON_INTERPRET=1`` they run on the CPU, slowly."""

from normkit.kernels.triton import operators
from normkit.kernels.triton.plan import INTERPRETED

__all__ = ["INTERPRETED", "operators"]
