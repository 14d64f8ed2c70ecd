"""Which kernels compute a call: what a block asks for, else the environment, else the best."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit.errors import KernelError
from normkit.kernels import cpu, reference
from normkit.kernels.cpu import primitives as cpu_primitives

Kernels = Literal["reference", "cpu"]
ENVIRONMENT_VARIABLE = "NORMKIT_KERNELS"


@dataclass(slots=True)
class _Asked:
    """What the innermost ``use_kernels`` asks for.

    Process-wide, as torch's own backend flags are: ``torch.compile`` can guard an attribute, but
    not a context variable.
    """

    kernels: str | None


_WHY_NOT_CPU = cpu.why_not()  # loads the library: a program that uses its operators must find them
_asked = _Asked(os.environ.get(ENVIRONMENT_VARIABLE))


class Choice(NamedTuple):
    """The kernels that compute a call, and why these."""

    kernels: Kernels
    reason: str


@contextmanager
def use_kernels(kernels: Kernels) -> Generator[None]:
    """Run the block with these kernels wherever they can compute a call.

    The environment variable ``NORMKIT_KERNELS`` does the same for a whole process.

    Args:
        kernels: ``"reference"`` (plain torch) or ``"cpu"`` (C++). What the chosen ones cannot do
            (function transforms, second derivatives, other devices) the reference does;
            ``normkit.explain`` says so.

    Raises:
        KernelError: If there are no such kernels, or they were not built.

    Example:
        >>> import normkit as nk
        >>> with use_kernels("reference"):
        ...     nk.explain(nk.BatchNorm(6), torch.randn(4, 6, 5, 7)).kernels
        'reference'
    """
    require_kernels(kernels)
    before, _asked.kernels = _asked.kernels, kernels
    try:
        yield
    finally:
        _asked.kernels = before


def choose(x: Tensor) -> Choice:
    """The kernels for a call on ``x`` here and now, in words.

    Raises:
        KernelError: If the environment asks for kernels that there are not.
    """
    if _asked.kernels is not None and require_kernels(_asked.kernels) == "reference":
        return Choice("reference", "the reference kernels were asked for")
    obstacle = _obstacle(x)
    if obstacle is not None:
        return Choice("reference", f"{obstacle}, which the C++ kernels do not compute")
    if _WHY_NOT_CPU is not None:
        return Choice("reference", _WHY_NOT_CPU)
    return Choice("cpu", f"the C++ kernels compute this (vector code: {cpu.instruction_set()})")


def takes_cpu(x: Tensor) -> bool:
    """Whether the C++ kernels compute a call on ``x``: ``choose`` without the words."""
    if _asked.kernels is not None and require_kernels(_asked.kernels) == "reference":
        return False
    return _WHY_NOT_CPU is None and _obstacle(x) is None


def primitives(x: Tensor) -> ModuleType:
    """The module whose ``moments``, ``apply``, ``reduce_grad`` and ``combine_grad`` take ``x``."""
    return cpu_primitives if x.numel() and takes_cpu(x) else reference


def require_kernels(name: str) -> Kernels:
    """Return the name if there are such kernels.

    Raises:
        KernelError: If it is unknown, or they were not built.
    """
    known: tuple[Kernels, ...] = get_args(Kernels)
    for kernels in known:
        if kernels == name:
            if kernels == "cpu" and _WHY_NOT_CPU is not None:
                raise KernelError(f"the cpu kernels were asked for; {_WHY_NOT_CPU}")
            return kernels
    raise KernelError(f"there are no kernels {name!r}; these are known: {', '.join(known)}")


def _obstacle(x: Tensor) -> str | None:
    """Why the C++ kernels cannot compute a call on ``x``, or None."""
    if not x.is_cpu:
        return f"the input is on {x.device}"
    if torch.compiler.is_exporting():
        return "the call is being exported"
    return transform()


def transform() -> str | None:
    """What looks through the call and wants plain torch operators to look at, or None."""
    if functorch_is_active():
        return "the call is under a torch.func transform"
    if forward_ad._current_level >= 0:
        return "the call is under forward-mode differentiation"
    return None


def functorch_is_active() -> bool:
    """Whether the call runs under ``torch.func`` (vmap, grad, jvp, ...)."""
    return torch._C._are_functorch_transforms_active()
