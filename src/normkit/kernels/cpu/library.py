"""The compiled library: found, and loaded once."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from normkit.kernels.operators import NAMESPACE, SCHEMAS, define
from normkit.text import shortened

LIBRARY = Path(__file__).with_name("_C.so")
REASON_NAME = "not_built.txt"  # what the build leaves beside it when there is no library
BUILD_AGAIN = "pip install --no-build-isolation --no-deps --force-reinstall ."
operators = SimpleNamespace(
    MOST_CHANNELS_OF_A_POSITION=sys.maxsize, MOST_CHANNELS_OF_A_GROUP=sys.maxsize
)
"""The set of kernels: the operators, looked up once. As an attribute of ``torch.ops`` each costs a
microsecond a call."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the operators are then Triton's


@cache
def why_not() -> str | None:
    """Load the library on the first call; the reason why it cannot be used, or None."""
    if INTERPRETED:
        return "triton's interpreter (TRITON_INTERPRET=1) computes the operators on the CPU"
    if not LIBRARY.exists():
        return (
            f"the CPU kernels were not built: {_why_not_built()}; with torch and a C++ compiler "
            f"there, run `{BUILD_AGAIN}` in the folder of normkit's sources"
        )
    define()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"the CPU kernels do not load into torch {torch.__version__}: {error}; run "
            f"`{BUILD_AGAIN}` in the folder of normkit's sources"
        )
    for name in SCHEMAS:
        setattr(operators, name, getattr(getattr(torch.ops, NAMESPACE), name).default)
    return None


def _why_not_built() -> str:
    """What the build has left as its reason, in one line."""
    try:
        return shortened(LIBRARY.with_name(REASON_NAME).read_text(encoding="utf-8"))
    except OSError:
        return "the package has no library, and no word of why"


def require() -> None:
    """Load the library.

    Raises:
        RuntimeError: If it was not built or does not load, with the reason.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)


@cache
def warn_that_it_is_slow() -> None:
    """Warn, once a process, that calls which the library would compute take longer without it."""
    if INTERPRETED:
        return
    warnings.warn(
        f"normkit computes on the CPU without its C++ kernels, with the same results and several "
        f"times slower: {why_not()}",
        UserWarning,
        stacklevel=2,
    )


def available() -> bool:
    """Whether the compiled operators ``torch.ops.normkit.*`` can be called."""
    return why_not() is None


def instruction_set() -> str:
    """Which vector code this processor runs: ``avx512``, ``avx2`` or ``default``."""
    name = ctypes.CDLL(str(LIBRARY)).normkit_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
