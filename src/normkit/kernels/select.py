"""Selection of kernels for a call: by ``use_kernels``, else the environment, else the device."""

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
from torch import Tensor, nn
from torch.autograd import forward_ad

from normkit.errors import KernelError
from normkit.kernels import cpu, reference
from normkit.kernels.cpu import primitives as cpu_primitives

Kernels = Literal["reference", "cpu", "triton"]
NAMES: dict[Kernels, str] = {"reference": "reference", "cpu": "C++", "triton": "Triton"}
ENVIRONMENT_VARIABLE = "NORMKIT_KERNELS"
OLDEST_GPU = 7  # compute capability


class _Block:
    """An open ``use_kernels`` block, compared by identity."""

    __slots__ = ("kernels",)

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels


class _Request:
    """The kernels that are requested by ``use_kernels`` blocks or the environment.

    A thread uses the kernels of its own innermost block. A thread without a block (autograd's, for
    instance) uses ``kernels``: those of the latest open block of any thread, else those of the
    environment. ``torch.compile`` guards this attribute; it cannot guard thread-local state.
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
        """Close a block, in any order with other threads' blocks; closing twice does no harm."""
        self.thread.blocks = [other for other in self.own() if other is not block]
        if block in self.blocks:
            self.blocks.remove(block)
        self._settle()

    def _settle(self) -> None:
        """Set ``kernels`` to those of the latest block; repeat if another thread changed them.

        There is no lock, because an interruption could leave it locked.
        """
        while self.kernels != (latest := [self.default, *(b.kernels for b in self.blocks)][-1]):
            self.kernels = latest

    def own(self) -> list[_Block]:
        """Open blocks of this thread, the innermost last."""
        return getattr(self.thread, "blocks", [])

    def here(self) -> str | None:
        """The kernels that this thread requests, or None."""
        if torch.compiler.is_compiling() or not self.blocks:
            return self.kernels
        own = self.own()
        return own[-1].kernels if own else self.kernels


# This loads the library at import, so that programs find the operators in ``torch.ops.normkit``.
_WHY_NOT_CPU = cpu.why_not()
_request = _Request(os.environ.get(ENVIRONMENT_VARIABLE))


class Call(NamedTuple):
    """What decides, beside the input, which kernels compute a call; reasons are texts or None.

    Args:
        why_formula: Why no kernels compute the call.
        why_tables: Why no operator computes all of the call, so that torch does the algebra on
            tables.
        span: ``"position"`` or ``"group"`` if one GPU program must hold all of its channels.
        why_torch_moves: Why torch's operators, not the kernels, update the running statistics.
    """

    why_formula: str | None = None
    why_tables: str | None = None
    span: Literal["position", "group"] | None = None
    why_torch_moves: str | None = None


Way = Literal["operator", "tables", "graph", "formula"]
"""How a call is computed: ``"operator"``: by one operator. ``"tables"``: by the kernels' passes
over the map, with torch's operators on tables in between. ``"graph"``: in a compiled graph, by one
operator for the statistics. ``"formula"``: by torch's operators alone."""


class Decision(NamedTuple):
    """How a call is computed, by which kernels, and why."""

    way: Way
    kernels: Kernels
    reason: str
    operators: Any = None  # the set of kernels, see nodes.Kernels; None for the registered ones


ORDINARY = Call()
PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors with memory of their own; others (subclasses, fake tensors) only stand for
tensors, so that torch must find the kernels of a registered operator."""


@contextmanager
def use_kernels(kernels: Kernels) -> Generator[None]:
    """Run the block with these kernels, in every call that they can compute.

    The block holds for this thread and for threads without a block of their own. The environment
    variable ``NORMKIT_KERNELS`` does the same for a whole process.

    Args:
        kernels: ``"reference"`` (plain torch), ``"cpu"`` (C++) or ``"triton"`` (GPU). The
            reference computes what the chosen kernels cannot (function transforms, second
            derivatives, other devices); ``normkit.explain`` says which kernels compute a call.

    Raises:
        KernelError: If the kernels are unknown, were not built, or do not load.

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
            _request.enter(block)
            yield
        finally:
            _request.leave(block)
    except BaseException:  # an interruption may have come before the inner ``try``
        _request.leave(block)
        raise


def decide(x: Tensor, call: Call = ORDINARY, *, is_computed: bool = True) -> Decision:
    """Decide which kernels compute a call on ``x``, and how; nothing else decides that.

    Args:
        x: The input.
        call: What is special about the call.
        is_computed: Whether the call is computed next; if so, missing C++ kernels cause a warning.

    Raises:
        KernelError: If the environment names kernels that are unknown or do not load.
    """
    if call.why_formula is not None:
        return Decision("formula", "reference", call.why_formula)
    if x.numel() == 0:
        return _EMPTY
    best = _BEST.get(x.device.type) if _request.kernels is None else None
    kernels, why_formula = _candidate(x) if best is None else (best, None)
    is_compiled = torch.compiler.is_compiling()
    obstacle = transform(is_compiled)
    if why_formula is None and obstacle is not None:
        why_formula = f"{obstacle}, which the {NAMES[kernels]} kernels do not compute"
    if why_formula is None:
        why_formula = _WHY_NOT_CPU if kernels == "cpu" else _why_not_triton(x.device)
    if why_formula is not None:
        return _formula(why_formula, is_computed and not is_compiled)
    if is_compiled:
        return _compiled(x, call, kernels)
    usual = _BY_CPU if kernels == "cpu" else _by_triton()
    if type(x) not in PLAIN:
        usual = usual._replace(operators=None)
    return usual if call is ORDINARY else _special(x, call, usual)


def _formula(why: str, may_warn: bool) -> Decision:
    if why is _WHY_NOT_CPU and may_warn:
        cpu.warn_that_it_is_slow()
    return Decision("formula", "reference", why)


def _compiled(x: Tensor, call: Call, kernels: Kernels) -> Decision:
    """The decision while ``torch.compile`` traces."""
    if kernels == "triton":
        return _GRAPH
    if call.why_tables is not None:
        return _TRACED
    return _REGISTERED if call is ORDINARY else _special(x, call, _REGISTERED)


def _candidate(x: Tensor) -> tuple[Kernels, str | None]:
    """The kernels for ``x`` by request and device, and a reason if these are the reference."""
    wanted = None if _request.kernels is None else _request.here()
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
    """The decision for a call that differs from the usual one, which is one operator."""
    kernels, name = usual.kernels, NAMES[usual.kernels]
    why_tables = call.why_tables
    if call.span is not None:
        operators = cpu.operators if kernels == "cpu" else _triton().operators
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
    """Return the name of kernels that can be used.

    Raises:
        KernelError: If they are unknown, were not built, or do not load.
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
    """The C++ kernels' instruction set, for reports; empty for other kernels."""
    return f" (vector code: {cpu.instruction_set()})" if kernels == "cpu" else ""


def _why_not_loaded(kernels: Kernels) -> str | None:
    if kernels == "triton":
        return _why_triton_is_missing()
    return _WHY_NOT_CPU if kernels == "cpu" else None


def _why_not_triton(device: torch.device) -> str | None:
    """Load the Triton kernels once; return why they cannot compute on a device, or None."""
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
    except ValueError:  # sys.modules has None for the package, which forbids its import
        return False


def _triton() -> ModuleType:
    from normkit.kernels import triton  # a slow import, which the CPU does not need

    return triton


_BEST: dict[str, Kernels] = {"cpu": "cpu", "cuda": "triton"}
"""The kernels for each type of device; benchmarks and tests that simulate a GPU change this."""
_COMPUTE = "the {} kernels compute this"
_BY_CPU = Decision("operator", "cpu", _COMPUTE.format(NAMES["cpu"]), cpu.operators)
_REGISTERED = _BY_CPU._replace(operators=None)
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

for _constant in (_why_not_triton, _why_not_loaded):
    # The results never change, so torch.compile need not trace through the import of triton.
    # torch.compiler.assume_constant_result sets this attribute too, but importing it is slow.
    _constant._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def transform(is_compiled: bool) -> str | None:
    """The transform that traces the call and needs plain torch operators, in words, or None.

    ``is_compiled`` says whether ``torch.compile`` traces the call.
    """
    # Not is_exporting(), which is always true while torch.compile of torch 2.11 traces.
    if torch.compiler._is_exporting_flag:
        return "the call is being exported"
    if torch._C._are_functorch_transforms_active():
        return "the call is under a torch.func transform"
    if forward_ad._current_level >= 0:
        return "the call is under forward-mode differentiation"
    if not is_compiled and torch._C._is_tracing():
        return "the call is traced by torch.jit"
    return None


def functorch_is_active() -> bool:
    """Whether the call runs under ``torch.func`` (vmap, grad, jvp, ...)."""
    return torch._C._are_functorch_transforms_active()
