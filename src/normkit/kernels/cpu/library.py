"""The compiled library: found, and loaded once."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from normkit.kernels.operators import NAMESPACE, SCHEMAS, define

LIBRARY = Path(__file__).with_name("_C.so")
operators = SimpleNamespace(
    MOST_CHANNELS_OF_A_POSITION=sys.maxsize, MOST_CHANNELS_OF_A_GROUP=sys.maxsize
)
"""The set of kernels: the operators, looked up once. As an attribute of ``torch.ops`` each costs a
microsecond a call."""


@cache
def why_not() -> str | None:
    """Load the library on the first call; the reason why it cannot be used, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton's interpreter (TRITON_INTERPRET=1) computes the operators on the CPU"
    if not LIBRARY.exists():
        return (
            "the CPU kernels were not built (no C++ compiler when normkit was installed); "
            "install a compiler, then `pip install --no-build-isolation --force-reinstall normkit`"
        )
    define()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CPU kernels do not load into torch {torch.__version__}: {error}"
    for name in SCHEMAS:
        setattr(operators, name, getattr(getattr(torch.ops, NAMESPACE), name).default)
    return None


def require() -> None:
    """Load the library.

    Raises:
        RuntimeError: If it was not built or does not load, with the reason.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)


def available() -> bool:
    """Whether the compiled operators ``torch.ops.normkit.*`` can be called."""
    return why_not() is None


def instruction_set() -> str:
    """Which vector code this processor runs: ``avx512``, ``avx2`` or ``default``."""
    name = ctypes.CDLL(str(LIBRARY)).normkit_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
