"""Finding the compiled library, and loading it once."""

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
REASON_NAME = "not_built.txt"  # the build writes this file beside it if it cannot build one
BUILD_AGAIN = "pip install --no-build-isolation --no-deps --force-reinstall ."
operators = SimpleNamespace(
    MOST_CHANNELS_OF_A_POSITION=sys.maxsize, MOST_CHANNELS_OF_A_GROUP=sys.maxsize
)
"""The set of C++ kernels: each operator is looked up once, because an attribute of ``torch.ops``
costs a microsecond per call."""
# In triton's interpreter the Triton kernels are registered for the CPU in place of these.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_not() -> str | None:
    """Load the library on the first call; the reason why it cannot be used, or None."""
    if INTERPRETED:
        return "triton's interpreter (TRITON_INTERPRET=1) computes the operators on the CPU"
    if not LIBRARY.exists():
        return (
            f"the CPU kernels were not built: {_why_not_built()}; install torch and a C++ "
            f"compiler, then run `{BUILD_AGAIN}` in the folder of normkit's sources"
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
    """The reason that the build has written, in one line."""
    try:
        return shortened(LIBRARY.with_name(REASON_NAME).read_text(encoding="utf-8"))
    except OSError:
        return "the package contains no library, and the build has left no reason"


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
    """Warn, once per process, that calls are slower because the library is missing."""
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
