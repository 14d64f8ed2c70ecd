"""Plans: the allocations and launches of a kind of call, worked out once and then repeated.

Calls are of one kind if they have the same function, options, and shapes, strides, dtypes, device
and address modulo 16 bytes of each tensor. (Triton compiles a faster kernel if 16 divides an
address.) The first call of a kind runs the function on tensors without memory. During this run
``launch`` starts nothing, but records a kernel and its arguments. These records are the plan. Later
calls of the kind allocate memory, start the kernels, and return.

So a planned function may decide only by its options and by shapes, strides and dtypes, and only
kernels may compute. All tensors that it makes with ``new_empty`` and does not return share one
allocation. One number may differ between calls of a kind: the rate of the buffers' update. Kernels
take its two parts, ``RATE``, after their tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.kernels.operators import several_devices
from normkit.kernels.triton.arguments import allocation, halves
from normkit.kernels.triton.streams import moments_kernel

INTERPRETED = not isinstance(moments_kernel, triton.JITFunction)
"""Whether the kernels were defined under ``TRITON_INTERPRET=1``, to run on the CPU."""
INTERPRETED_PROCESSORS = 2
MOST_PLANS = 4096
"""More plans replace the oldest, so that shapes which change with each call do not fill memory."""
ALIGNMENT = 16  # bytes; triton compiles a kernel for whether this divides an address
LINE = 128  # bytes of a GPU's cache line, at whose start each tensor begins

Given = tuple[Any, ...]
"""Tensors, or None where a call has none."""
Address = Any
"""A kernel's argument: the address of a tensor, a part of the rate, or None."""


class Part(Enum):
    """A part of the rate, which is the sum of two float32 numbers."""

    HIGH = 1
    LOW = 2


RATE = Part.HIGH, Part.LOW
_PLANS: dict[Hashable, Plan] = {}
_drafts = threading.local()


def planned(
    function: Callable[..., Any],
    tensors: Given,
    options: tuple[Hashable, ...] = (),
    rate: float | None = None,
) -> Any:
    """Compute ``function(*tensors, *options)`` by the plan of this kind of call.

    Args:
        function: Takes tensors and returns one or a tuple of them, each with memory of its own.
        tensors: The first is on the device that computes.
        options: Numbers, flags and tuples of them.
        rate: Rate of the buffers' update; calls with different rates are of one kind.

    Raises:
        RuntimeError: If tensors are on several devices, whose memory a kernel cannot read.
    """
    device = tensors[0].get_device()
    kind: list[Hashable] = [function, options]
    addresses: list[Address] = []
    bits = 0
    for t in tensors:
        if t is None:
            kind.append(None)
            addresses.append(None)
        else:
            if t.get_device() != device:
                raise several_devices(tensors)
            address = t.data_ptr()
            bits |= address
            kind += (t.shape, t.stride(), t.dtype)
            addresses.append(address)
    kind.append(device)
    if bits % ALIGNMENT:
        kind += [None if a is None else a % ALIGNMENT for a in addresses]
    addresses += _NO_RATE if rate is None else (None, *halves(rate))
    key = tuple(kind)
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.pop(next(iter(_PLANS)), None)  # another thread may have removed it
        plan = _PLANS[key] = Plan(function, tensors, options)
    return plan(tensors, addresses)


def launch(
    kernel: Any,
    num_programs: int,
    tensors: Sequence[object],
    numbers: Sequence[object],
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Record the launch of a kernel in the plan.

    Args:
        kernel: A Triton kernel that takes tensors, perhaps ``RATE``, then numbers, then constants.
        num_programs: Number of programs.
        tensors: Arguments of the planned function, tensors that it has made, views of these, None,
            or the parts of the rate.
        numbers: The kernel's arguments that are numbers.
        num_warps: Number of warps of a program.
        constants: The kernel's constants, by name.
    """
    draft: _Draft = _drafts.current
    pieces = [draft.piece(t) if isinstance(t, Tensor) else t for t in tensors]
    draft.launches.append(
        Launch(kernel, num_programs, pieces, tuple(numbers), num_warps, constants)
    )


def copied(x: Tensor) -> Tensor:
    """Plan a contiguous copy of an argument of the planned function, and return the copy."""
    return _drafts.current.copied(x)


def in_one_piece(t: Tensor) -> Tensor:
    """The tensor, or a contiguous copy, because kernels read tables as contiguous."""
    return t if t.is_contiguous() else copied(t)


def num_processors() -> int:
    """Number of multiprocessors of the GPU that the plan is for."""
    return _num_processors(_drafts.current.device)


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class Piece(NamedTuple):
    """A kernel's argument: the place of a tensor, an offset in bytes, and the dtype to read."""

    place: int
    offset: int
    dtype: torch.dtype


class Launch:
    """One launch of a plan.

    The first time triton compiles and starts the kernel. Later the compiled kernel is started
    directly, with addresses in place of tensors.
    """

    __slots__ = (
        "compiled", "constants", "grid", "kernel", "num_warps",
        "numbers", "pick", "pieces", "start", "values",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        num_programs: int,
        pieces: Sequence[object],
        numbers: tuple[object, ...],
        num_warps: int,
        constants: Mapping[str, Any],
    ) -> None:
        self.kernel, self.grid, self.pieces = kernel, (num_programs, 1, 1), pieces
        self.numbers, self.num_warps, self.constants = numbers, num_warps, constants
        self.start: Callable[..., object] | None = None
        self.compiled: tuple[object, ...] = ()
        self.values: tuple[object, ...] = ()  # numbers and constants, as a compiled kernel has them
        self.pick: Callable[[Sequence[Address]], tuple[Address, ...]] = tuple

    def compile(self, arguments: Sequence[Tensor | float | None]) -> None:
        """Let triton compile and start the kernel; several threads may do so at once."""
        compiled = self.kernel[self.grid](
            *arguments, *self.numbers, **self.constants, num_warps=self.num_warps
        )
        if not INTERPRETED:
            names = self.kernel.arg_names[len(arguments) + len(self.numbers) :]
            self.values = (*self.numbers, *(self.constants[name] for name in names))
            # None stands for what triton's profiler and hooks would be told about a start.
            self.compiled = compiled.function, compiled.packed_metadata, None, None, None
            self.start = partial(compiled.run, *self.grid)  # last: other threads look at it


class _Draft:
    """A plan that is being made: tensors without memory, and the place of each.

    Places number the arguments first, then the tensors that the function makes.
    """

    def __init__(self, tensors: Given, device: torch.device) -> None:
        self.device = device
        self.launches: list[Launch] = []
        self.copies: list[int] = []
        self.reserved: list[Tensor] = []
        self.num_given = len(tensors)
        self._places: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that identities stay unique
        self.given = [None if t is None else self._given(i, t) for i, t in enumerate(tensors)]

    def _given(self, place: int, t: Tensor) -> Tensor:
        shape = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        return self._keep(place, shape)

    def _keep(self, place: int, t: Tensor) -> Tensor:
        self._places[_identity(t)] = place
        self._alive.append(t)
        return t

    def copied(self, t: Tensor) -> Tensor:
        place = self._places[_identity(t)]
        self.copies.append(place)
        return self._keep(place, t.new_empty(t.shape))

    def piece(self, t: Tensor) -> Piece:
        """The place of a tensor; one that the function has just made gets a new place."""
        if _identity(t) not in self._places:
            self._keep(self.num_given + len(self.reserved), t)
            self.reserved.append(t)
        return Piece(self._places[_identity(t)], int(t.storage_offset()) * t.itemsize, t.dtype)

    def run(self, function: Callable[..., Any], options: tuple[Hashable, ...]) -> Any:
        before = getattr(_drafts, "current", None)
        _drafts.current = self
        try:
            with _OnlyShapes(), torch.no_grad():
                return function(*self.given, *options)
        finally:
            _drafts.current = before


def _identity(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class _OnlyShapes(TorchDispatchMode):
    """Refuses every operation of torch but allocations and views, because plans have no others."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not (func.is_view or "empty" in func.overloadpacket.__name__):
            raise RuntimeError(
                f"a planned function called {func}; it may only allocate, view and launch: compute "
                f"this in a kernel, or before or after the planned function"
            )
        return func(*args, **kwargs or {})


def _require_own_memory(results: Sequence[Tensor], places: Sequence[int], num_given: int) -> None:
    for t, place in zip(results, places, strict=True):
        is_whole = t.untyped_storage().nbytes() == t.numel() * t.itemsize
        if not is_whole or place < num_given or places.count(place) > 1:
            raise RuntimeError(
                f"a planned function returned a tensor {tuple(t.shape)} that shares memory with "
                f"another or with an argument; each result must be a whole tensor that it has made"
            )


class Plan:
    """The allocations, launches and results of calls of one kind."""

    def __init__(
        self, function: Callable[..., Any], tensors: Given, options: tuple[Hashable, ...]
    ) -> None:
        self._device = next(t.device for t in tensors if t is not None)
        draft = _Draft(tensors, self._device)
        found = draft.run(function, options)
        self._is_single = isinstance(found, Tensor)
        returned = (found,) if self._is_single else tuple(found)
        results = [draft.piece(t).place for t in returned]
        _require_own_memory(returned, results, draft.num_given)
        self._launches, self._copies = draft.launches, draft.copies
        self._make = [allocation(t.shape, t.stride(), t.dtype, self._device) for t in returned]
        self._reserve(draft, results)
        self._resolve()

    def _reserve(self, draft: _Draft, results: Sequence[int]) -> None:
        """Divide one allocation among all tensors that are not returned.

        A call's list of addresses has arguments, None, the rate's parts, results, parts of the
        allocation, and views, in this order.
        """
        count = draft.num_given
        self._index: dict[object, int] = {place: place for place in range(count)}
        places = range(count, count + len(draft.reserved))
        inner = [place for place in places if place not in results]
        self._offsets, end = list[int](), 0
        for place in inner:
            self._offsets.append(end)
            size = draft.reserved[place - count].untyped_storage().nbytes()
            end += max(-(-size // LINE), 1) * LINE
        self._take_memory = allocation((end,), (1,), torch.uint8, self._device) if end else None
        order = None, *RATE, *results, *inner
        self._index |= {place: i for i, place in enumerate(order, start=count)}

    def _resolve(self) -> None:
        """Decide which addresses each kernel takes from the list."""
        views = dict[tuple[int, int], int]()
        for one in self._launches:
            picked = list[int]()
            for piece in one.pieces:
                if not isinstance(piece, Piece):
                    picked.append(self._index[piece])
                elif piece.offset == 0:
                    picked.append(self._index[piece.place])
                else:
                    view = self._index[piece.place], piece.offset
                    picked.append(views.setdefault(view, len(self._index) + len(views)))
            one.pick = itemgetter(*picked)
        self._views = tuple(views)

    def __call__(self, tensors: Given, addresses: list[Address]) -> Any:
        """Allocate, start the kernels, and return the results."""
        index = self._device.index
        if index is None or torch._C._cuda_getDevice() == index:
            return self._carry_out(index, tensors, addresses)
        with torch.cuda.device(index):
            return self._carry_out(index, tensors, addresses)

    def _carry_out(self, index: int | None, tensors: Given, addresses: list[Address]) -> Any:
        if self._copies:
            tensors = self._copied(tensors, addresses)
        results = list[Tensor]()
        for make in self._make:
            t = make()
            results.append(t)
            addresses.append(t.data_ptr())
        memory = None
        if self._take_memory is not None:
            memory = self._take_memory()
            start = memory.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        for i, offset in self._views:
            addresses.append(addresses[i] + offset)
        stream = _current_stream(index)
        for one in self._launches:
            if one.start is None:
                whole = [*tensors, *addresses[len(tensors) :][:3], *results]
                one.compile([self._argument(p, whole, memory) for p in one.pieces])
            else:
                one.start(stream, *one.compiled, *one.pick(addresses), *one.values)
        return results[0] if self._is_single else tuple(results)

    def _copied(self, tensors: Given, addresses: list[Address]) -> Given:
        found = list(tensors)
        for i in self._copies:
            found[i] = copy = tensors[i].contiguous()
            addresses[i] = copy.data_ptr()
        return tuple(found)

    def _argument(
        self,
        piece: object,
        whole: Sequence[Any],
        memory: Tensor | None,
    ) -> Tensor | float | None:
        """The tensor or number that an address stands for, for triton's first start."""
        if not isinstance(piece, Piece):
            return whole[self._index[piece]]
        at = self._index[piece.place]
        if at >= len(whole) and memory is not None:
            start = self._offsets[at - len(whole)] + piece.offset
            return memory[start:].view(piece.dtype)
        base = whole[at]
        if piece.offset in (0, base.untyped_storage().nbytes()):  # an empty view
            return base
        return base.as_strided((1,), (1,), base.storage_offset() + piece.offset // base.itemsize)


def _current_stream(device: int | None) -> int | None:
    """The current stream of a GPU, as its driver knows it; None on the CPU."""
    return None if device is None else torch._C._cuda_getCurrentRawStream(device)


_NO_RATE = None, 0.0, 0.0
