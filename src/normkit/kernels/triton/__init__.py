"""Triton kernels for the GPU; under ``TRITON_INTERPRET=1`` they run on the CPU, slowly."""

from normkit.kernels.triton.functions import normalize_given, normalize_pooled
from normkit.kernels.triton.launch import INTERPRETED
from normkit.kernels.triton.operators import register

__all__ = ["INTERPRETED", "normalize_given", "normalize_pooled", "register"]
