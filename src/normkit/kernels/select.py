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


class Call(NamedTuple):
    """What of a call, beside its input, decides who computes it; reasons are words, or None.

    Args:
        why_formula: Why no kernels compute it.
        why_tables: Why no operator does all of it: the algebra on tables is then torch's.
        span: ``"position"`` or ``"group"``, whose channels one program of a GPU must hold.
        why_torch_moves: Why torch's operators move its running statistics, not the kernels.
    """

    why_formula: str | None = None
    why_tables: str | None = None
    span: Literal["position", "group"] | None = None
    why_torch_moves: str | None = None


Way = Literal["operator", "tables", "graph", "formula"]
"""One operator does all; or the kernels' passes over the map, with torch's operators on tables in
between; or one operator for statistics in a compiled graph; or the formula in torch's operators."""


class Decision(NamedTuple):
    """Who computes a call, how, and why so."""

    way: Way
    kernels: Kernels
    reason: str
    operators: Any = None  # the set of kernels whose operator does it, see nodes.Kernels


ORDINARY = Call()


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


def decide(x: Tensor, call: Call = ORDINARY, *, is_computed: bool = True) -> Decision:
    """Who computes a call on ``x`` here and now: the one place where that is decided.

    Args:
        x: The input.
        call: What is special about the call.
        is_computed: Whether the call comes next. It warns then, once, where that is slow.

    Raises:
        KernelError: If the environment asks for kernels that there are not.
    """
    if call.why_formula is not None:
        return Decision("formula", "reference", call.why_formula)
    if x.numel() == 0:
        return _EMPTY
    best = _BEST.get(x.device.type) if _asked.kernels is None else None
    kernels, why_formula = _candidate(x) if best is None else (best, None)
    if why_formula is None:
        obstacle = transform()
        if obstacle is not None:
            why_formula = f"{obstacle}, which the {NAMES[kernels]} kernels do not compute"
        else:
            why_formula = _WHY_NOT_CPU if kernels == "cpu" else _why_not_triton(x.device)
    if why_formula is not None:
        if why_formula is _WHY_NOT_CPU and is_computed and not torch.compiler.is_compiling():
            cpu.warn_that_it_is_slow()
        return Decision("formula", "reference", why_formula)
    if torch.compiler.is_compiling() and (kernels == "triton" or call.why_tables is not None):
        return _GRAPH if kernels == "triton" else _TRACED
    usual = _BY_CPU if kernels == "cpu" else _by_triton()
    return usual if call is ORDINARY else _special(x, call, usual)


def _candidate(x: Tensor) -> tuple[Kernels, str | None]:
    """What would compute on ``x`` if nothing around the call forbade it; why not, if reference."""
    wanted = None if _asked.kernels is None else _asked.here()
    asked = None if wanted is None else require_kernels(wanted)
    if asked == "reference":
        return "reference", "the reference kernels were asked for"
    best = _BEST.get(x.device.type)
    if best is not None and asked in (None, best, "triton"):
        return asked or best, None
    name = NAMES[asked or "cpu"]
    return "reference", f"the input is on {x.device}, which the {name} kernels do not compute"


@cache
def _by_triton() -> Decision:
    return Decision("operator", "triton", _COMPUTE.format(NAMES["triton"]), _triton().operators)


def _special(x: Tensor, call: Call, usual: Decision) -> Decision:
    """Where one operator would do a call, but for what is special about it."""
    kernels, operators, name = usual.kernels, usual.operators, NAMES[usual.kernels]
    why_tables = call.why_tables
    if call.span is not None:
        is_position = call.span == "position"
        most = operators.MOST_CHANNELS_OF_A_POSITION
        most = most if is_position else operators.MOST_CHANNELS_OF_A_GROUP
        if x.shape[1] > most:
            limit = f"there are {x.shape[1]} channels, and a program of the {name} kernels holds "
            if is_position:
                return Decision("formula", "reference", f"{limit}{most} of a position")
            why_tables = why_tables or f"{limit}{most}"
    if why_tables is not None:
        said = f"{usual.reason}, with torch's operators on tables, because {why_tables}"
        return Decision("tables", kernels, said)
    if call.why_torch_moves is None:
        return usual
    said = f"torch's operators move the running statistics, because {call.why_torch_moves}"
    return usual._replace(reason=f"{usual.reason}; {said}")


def primitives(x: Tensor) -> ModuleType:
    """The module whose ``moments``, ``apply``, ``reduce_grad`` and ``combine_grad`` take ``x``."""
    kernels = decide(x).kernels
    if kernels == "triton":
        from normkit.kernels.triton import primitives as triton_primitives  # slow

        return triton_primitives
    return cpu_primitives if kernels == "cpu" else reference


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


def details(kernels: Kernels) -> str:
    """What there is to say of the kernels that compute."""
    return f" (vector code: {cpu.instruction_set()})" if kernels == "cpu" else ""


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
    from normkit.kernels import triton  # slow, and nothing for the CPU

    return triton


_BEST: dict[str, Kernels] = {"cpu": "cpu", "cuda": "triton"}
"""The kernels for each type of device; what pretends that there is a GPU changes this."""
_COMPUTE = "the {} kernels compute this"
_BY_CPU = Decision("operator", "cpu", _COMPUTE.format(NAMES["cpu"]), cpu.operators)
_EMPTY = Decision("formula", "reference", "the input is empty")
_TRACED = Decision(
    "formula", "reference", "the call is compiled, and no C++ operator does all of it"
)
_GRAPH = Decision(
    "graph",
    "triton",
    "the call is compiled for a GPU: the Triton kernels compute the statistics, and torch.compile "
    "what it can fuse with the layers around",
)

for _asked_once in (_why_not_triton, _why_not_loaded):
    # what torch.compiler.assume_constant_result does, without importing the compiler: the answers
    # never change, and nothing need be traced through the import of triton
    _asked_once._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def transform() -> str | None:
    """What looks through the call and wants plain torch operators to look at, or None."""
    # not is_exporting(), which torch.compile of torch 2.11 takes to be true
    if torch.compiler._is_exporting_flag:
        return "the call is being exported"
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
