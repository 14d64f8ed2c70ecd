"""The compiled library: found, loaded once, its operators described to the tracers."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from normkit.kernels.cpu import shapes

LIBRARY = Path(__file__).with_name("_C.so")


@cache
def why_not() -> str | None:
    """Load the library on the first call; the reason why it cannot be used, or None."""
    if not LIBRARY.exists():
        return (
            "the CPU kernels were not built (no C++ compiler when normkit was installed); "
            "install a compiler, then `pip install --no-build-isolation --force-reinstall normkit`"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CPU kernels do not load into torch {torch.__version__}: {error}"
    shapes.register()
    return None


def available() -> bool:
    """Whether the compiled operators ``torch.ops.normkit.*`` can be called."""
    return why_not() is None


def instruction_set() -> str:
    """Which vector code this processor runs: ``avx512``, ``avx2`` or ``default``."""
    name = ctypes.CDLL(str(LIBRARY)).normkit_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
