"""Which kernels compute a call: what a block asks for, else the environment, else the best."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit.errors import KernelError
from normkit.kernels import cpu, reference
from normkit.kernels.cpu import primitives as cpu_primitives

Kernels = Literal["reference", "cpu", "triton"]
NAMES: dict[Kernels, str] = {"reference": "reference", "cpu": "C++", "triton": "Triton"}
ENVIRONMENT_VARIABLE = "NORMKIT_KERNELS"
OLDEST_GPU = 7  # compute capability


class _Block:
    """An open ``use_kernels``, equal to no other."""

    __slots__ = ("kernels",)

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels


class _Asked:
    """What ``use_kernels`` asks for.

    A thread follows its own innermost block. One without a block (autograd's, for instance)
    follows ``kernels``, what the latest block still open in any thread asks for, else the
    environment. ``torch.compile`` guards that attribute; it could not guard a thread's own.
    """

    def __init__(self, default: str | None) -> None:
        self.kernels = self.default = default
        self.blocks: list[_Block] = []  # open ones of all threads
        self.thread = threading.local()

    def enter(self, block: _Block) -> None:
        """Open a block in this thread."""
        self.blocks.append(block)
        self._settle()
        self.thread.blocks = [*self.own(), block]

    def leave(self, block: _Block) -> None:
        """Close a block, whatever other threads have opened or closed since; twice is once."""
        self.thread.blocks = [other for other in self.own() if other is not block]
        if block in self.blocks:
            self.blocks.remove(block)
        self._settle()

    def _settle(self) -> None:
        """Ask for what the latest block does; again if another thread came between.

        Not under a lock, which an interruption could leave locked.
        """
        while self.kernels != (latest := [self.default, *(b.kernels for b in self.blocks)][-1]):
            self.kernels = latest

    def own(self) -> list[_Block]:
        """Blocks of this thread, the innermost last."""
        return getattr(self.thread, "blocks", [])

    def here(self) -> str | None:
        """What this thread asks for."""
        if torch.compiler.is_compiling() or not self.blocks:
            return self.kernels
        own = self.own()
        return own[-1].kernels if own else self.kernels


_WHY_NOT_CPU = cpu.why_not()  # loads the library: a program that uses its operators must find them
_asked = _Asked(os.environ.get(ENVIRONMENT_VARIABLE))


class Choice(NamedTuple):
    """The kernels that compute a call, and why these."""

    kernels: Kernels
    reason: str


@contextmanager
def use_kernels(kernels: Kernels) -> Generator[None]:
    """Run the block with these kernels wherever they can compute a call.

    The block is this thread's; threads that have none of their own take part in it.
    The environment variable ``NORMKIT_KERNELS`` does the same for a whole process.

    Args:
        kernels: ``"reference"`` (plain torch), ``"cpu"`` (C++) or ``"triton"`` (GPU). What the
            chosen ones cannot do (function transforms, second derivatives, other devices) the
            reference does; ``normkit.explain`` says so.

    Raises:
        KernelError: If there are no such kernels, they were not built, or do not load.

    Example:
        >>> import normkit as nk
        >>> with use_kernels("reference"):
        ...     nk.explain(nk.BatchNorm(6), torch.randn(4, 6, 5, 7)).kernels
        'reference'
    """
    require_kernels(kernels)
    block = _Block(kernels)
    try:
        try:
            _asked.enter(block)
            yield
        finally:
            _asked.leave(block)
    except BaseException:  # also where the lines above were interrupted
        _asked.leave(block)
        raise


def choose(x: Tensor) -> Choice:
    """The kernels for a call on ``x`` here and now, in words.

    Raises:
        KernelError: If the environment asks for kernels that there are not.
    """
    candidate = _candidate(x)
    if candidate.kernels == "reference":
        return candidate
    name = NAMES[candidate.kernels]
    obstacle = _obstacle()
    if obstacle is not None:
        return Choice("reference", f"{obstacle}, which the {name} kernels do not compute")
    missing = _why_not(candidate.kernels, x.device)
    if missing is not None:
        return Choice("reference", missing)
    return Choice(candidate.kernels, f"the {name} kernels compute this{_details(candidate)}")


def chosen(x: Tensor) -> Kernels:
    """The kernels for a call on ``x``: ``choose`` without the words."""
    if _asked.kernels is not None:
        kernels = _candidate(x).kernels
    else:
        kernels = "cpu" if x.is_cpu else "triton" if x.is_cuda else "reference"
    if kernels == "cpu":
        if _WHY_NOT_CPU is not None:
            _tell_of_slow_calls()
            return "reference"
        return kernels if _obstacle() is None else "reference"
    if kernels == "triton" and x.numel() and _obstacle() is None:
        return kernels if _why_not_triton(x.device) is None else "reference"
    return "reference"


def _tell_of_slow_calls() -> None:
    if not torch.compiler.is_compiling():
        cpu.warn_that_it_is_slow()


def primitives(x: Tensor) -> ModuleType:
    """The module whose ``moments``, ``apply``, ``reduce_grad`` and ``combine_grad`` take ``x``."""
    kernels = chosen(x) if x.numel() else "reference"
    if kernels == "triton":
        from normkit.kernels.triton import primitives as triton_primitives  # noqa: PLC0415 - slow

        return triton_primitives
    return cpu_primitives if kernels == "cpu" else reference


def operators_for(x: Tensor) -> Any:  # noqa: ANN401 - see nodes.Kernels
    """The set of kernels whose operators take ``x``; None where the formula is computed."""
    if _asked.kernels is None and x.is_cpu and _WHY_NOT_CPU is None:  # ``chosen`` in fewer calls
        is_hindered = torch.compiler._is_exporting_flag or transform() is not None
        return None if is_hindered else cpu.operators
    kernels = chosen(x)
    if kernels == "triton":
        return _triton().operators
    return cpu.operators if kernels == "cpu" else None


def require_kernels(name: str) -> Kernels:
    """Return the name if there are such kernels.

    Raises:
        KernelError: If it is unknown, they were not built, or do not load.
    """
    known: tuple[Kernels, ...] = get_args(Kernels)
    for kernels in known:
        if kernels == name:
            missing = _why_not_loaded(kernels)
            if missing is not None:
                raise KernelError(f"the {name} kernels were asked for; {missing}")
            return kernels
    raise KernelError(f"there are no kernels {name!r}; these are known: {', '.join(known)}")


def _candidate(x: Tensor) -> Choice:
    """What would compute a call on ``x`` if nothing about the call forbade it."""
    wanted = _asked.here()
    asked = None if wanted is None else require_kernels(wanted)
    if asked == "reference":
        return Choice("reference", "the reference kernels were asked for")
    device = x.device.type
    if device not in ("cpu", "cuda"):
        name = NAMES[asked or "cpu"]
        return Choice(
            "reference", f"the input is on {x.device}, which the {name} kernels do not compute"
        )
    best: Kernels = "triton" if device == "cuda" else "cpu"
    if asked in (None, best) or asked == "triton":
        return Choice(asked or best, "")
    return Choice("reference", f"the input is on {x.device}, which the C++ kernels do not compute")


def _obstacle() -> str | None:
    """Why neither the C++ nor the Triton kernels can compute a call here, or None."""
    # not is_exporting(), which torch.compile of torch 2.11 takes to be true
    if torch.compiler._is_exporting_flag:
        return "the call is being exported"
    return transform()


def _details(choice: Choice) -> str:
    return f" (vector code: {cpu.instruction_set()})" if choice.kernels == "cpu" else ""


def _why_not(kernels: Kernels, device: torch.device) -> str | None:
    return _why_not_triton(device) if kernels == "triton" else _WHY_NOT_CPU


def _why_not_loaded(kernels: Kernels) -> str | None:
    if kernels == "triton":
        return _why_triton_is_missing()
    return _WHY_NOT_CPU if kernels == "cpu" else None


def _why_not_triton(device: torch.device) -> str | None:
    """Load the Triton kernels, once; the reason why they cannot compute on a device, or None."""
    return _triton_obstacle(device)


@cache
def _triton_obstacle(device: torch.device) -> str | None:
    missing = _why_triton_is_missing()
    if missing is not None:
        return missing
    interpreted = _triton().INTERPRETED
    if device.type == "cpu":
        needed = "which the Triton kernels compute only in triton's interpreter"
        return None if interpreted else f"the input is on cpu, {needed} (TRITON_INTERPRET=1)"
    if interpreted:
        return "triton runs in its interpreter (TRITON_INTERPRET=1), which computes on the CPU"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < OLDEST_GPU:
        return f"the GPU has compute capability {major}.{minor}; triton needs {OLDEST_GPU}.0"
    return None


@cache
def _why_triton_is_missing() -> str | None:
    """Why the Triton kernels cannot be imported, or None."""
    if not _is_installed("triton"):
        return (
            "triton is not installed; `pip install triton` (Linux), in the version torch asks for"
        )
    try:
        _triton().operators.register()
    except (ImportError, RuntimeError) as error:
        return f"the Triton kernels do not load: {error}"
    return None


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imports of it are forbidden
        return False


def _triton() -> ModuleType:
    from normkit.kernels import triton  # noqa: PLC0415 - slow, and nothing for the CPU

    return triton


for _asked_once in (_why_not_triton, _why_not_loaded):
    # what torch.compiler.assume_constant_result does, without importing the compiler: the answers
    # never change, and nothing need be traced through the import of triton
    _asked_once._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def transform() -> str | None:
    """What looks through the call and wants plain torch operators to look at, or None."""
    if torch._C._are_functorch_transforms_active():
        return "the call is under a torch.func transform"
    if forward_ad._current_level >= 0:
        return "the call is under forward-mode differentiation"
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "the call is traced by torch.jit"
    return None


def functorch_is_active() -> bool:
    """Whether the call runs under ``torch.func`` (vmap, grad, jvp, ...)."""
    return torch._C._are_functorch_transforms_active()
