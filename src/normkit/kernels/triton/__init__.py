"""Triton kernels for the GPU; under ``TRITON_INTERPRET=1`` they run on the CPU, slowly."""

from normkit.kernels.triton.composite import can_compute
from normkit.kernels.triton.functions import (
    normalize_composite,
    normalize_given,
    normalize_pooled,
    normalize_positions,
)
from normkit.kernels.triton.launch import INTERPRETED
from normkit.kernels.triton.operators import register
from normkit.kernels.triton.positional import can_hold

__all__ = [
    "INTERPRETED",
    "can_compute",
    "can_hold",
    "normalize_composite",
    "normalize_given",
    "normalize_pooled",
    "normalize_positions",
    "register",
]
