"""Plans: what calls of one kind do, worked out once and carried out again and again.

A kind is everything that decides how a map is cut or what a kernel is compiled for: the function,
its options, and each tensor's shape, strides, dtype, device and address modulo 16 bytes, which
triton compiles pointers for. The first call of a kind runs the function on tensors without memory:
``launch`` then starts nothing, it notes the kernel and which tensors it takes. What is noted is the
plan. Carrying it out takes memory, starts kernels and returns: no geometry, no look-ups.

A function that is planned thus decides by its options and by the tensors' kinds alone, and computes
with kernels only. What it reserves with ``new_empty`` and does not return is one piece of memory.
One number may change from call to call: the rate at which buffers move. Kernels take ``RATE``, its
two parts, after their tensors.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache, lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.kernels.triton.streams import moments_kernel

INTERPRETED = not isinstance(moments_kernel, triton.JITFunction)
"""Whether the kernels were defined under ``TRITON_INTERPRET=1``, to run on the CPU."""
INTERPRETED_PROCESSORS = 2
MOST_PLANS = 4096
"""Then the oldest goes: shapes that change with each call must not fill memory."""
ALIGNMENT = 16  # bytes that triton compiles pointers for
LINE = 128  # bytes of a GPU's cache line, where a piece of memory begins

Given = tuple[Any, ...]
"""Tensors, or None in the place of one."""
Address = Any
"""What a kernel is given for a tensor, an integer; for a part of the rate a float; or None."""


class Part(Enum):
    """Of the rate, as the sum of two numbers that float32 holds."""

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
    """``function(*tensors, *options)`` by the plan of its kind.

    Args:
        function: Takes tensors and returns one or a tuple of them, each with memory of its own.
        tensors: The first is on the device that computes.
        options: Numbers, flags and tuples of them.
        rate: At which buffers move; no part of the kind.
    """
    kind: list[Hashable] = [function, options]
    addresses: list[Address] = []
    bits = 0
    for t in tensors:
        if t is None:
            kind.append(None)
            addresses.append(None)
        else:
            address = t.data_ptr()
            bits |= address
            kind += (t.shape, t.stride(), t.dtype)
            addresses.append(address)
    kind.append(tensors[0].get_device())  # the others are there, too
    if bits % ALIGNMENT:
        kind += [None if a is None else a % ALIGNMENT for a in addresses]
    addresses += _NO_RATE if rate is None else (None, *halves(rate))
    key = tuple(kind)
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= MOST_PLANS:
            del _PLANS[next(iter(_PLANS))]
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
    """Have a kernel started at this point of the plan.

    Args:
        kernel: Takes tensors and perhaps ``RATE``, then numbers, then constants.
        num_programs: How many run.
        tensors: The planned function's, memory that it has reserved, or views of either; None, or
            the parts of the rate.
        numbers: What the kernel reads.
        num_warps: Of a program.
        constants: What the kernel is compiled for, by name.
    """
    draft: _Draft = _drafts.current
    pieces = [draft.piece(t) if isinstance(t, Tensor) else t for t in tensors]
    draft.launches.append(
        Launch(kernel, num_programs, pieces, tuple(numbers), num_warps, constants)
    )


def count_change(buffers: Iterable[Tensor | None]) -> None:
    """Tell autograd of buffers that a kernel has moved; it does not see kernels write."""
    moved = [buffer for buffer in buffers if buffer is not None]
    if moved:
        torch.autograd.graph.increment_version(moved)


def copied(x: Tensor) -> Tensor:
    """A contiguous copy of one of the planned function's tensors, which it takes in its place."""
    return _drafts.current.copied(x)


def in_one_piece(t: Tensor) -> Tensor:
    """A tensor as kernels read tables: contiguous."""
    return t if t.is_contiguous() else copied(t)


def num_processors() -> int:
    """Multiprocessors of the GPU that the plan is for."""
    return _num_processors(_drafts.current.device)


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class Piece(NamedTuple):
    """An argument of a kernel: which tensor or memory, how many bytes in, read as which dtype."""

    place: int
    offset: int
    dtype: torch.dtype


class Launch:
    """One kernel of a plan.

    The first start goes by way of triton, which compiles; the others start what it has compiled,
    with addresses in the place of tensors.
    """

    __slots__ = (
        "compiled", "constants", "grid", "kernel", "num_warps",
        "numbers", "pick", "pieces", "start",
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
        self.pick: Callable[[Sequence[Address]], tuple[Address, ...]] = tuple

    def compile(self, arguments: Sequence[Tensor | float | None]) -> None:
        """Start the kernel by way of triton."""
        compiled = self.kernel[self.grid](
            *arguments, *self.numbers, **self.constants, num_warps=self.num_warps
        )
        if not INTERPRETED:
            names = self.kernel.arg_names[len(arguments) + len(self.numbers) :]
            self.numbers = (*self.numbers, *(self.constants[name] for name in names))
            # with None for what triton's own profiler would be told of a start, and its hooks
            self.compiled = compiled.function, compiled.packed_metadata, None, None, None
            self.start = partial(compiled.run, *self.grid)


class _Draft:
    """A plan in the making: tensors without memory, and the place of each.

    Places count the function's tensors, then what it reserves.
    """

    def __init__(self, tensors: Given, device: torch.device) -> None:
        self.device = device
        self.launches: list[Launch] = []
        self.copies: list[int] = []
        self.reserved: list[Tensor] = []
        self.num_given = len(tensors)
        self._places: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no storage takes another's identity
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
        """Where a tensor lies; what is new is to be reserved."""
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
    """Refuses what a plan would not carry out: all but reserving memory and viewing it."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not (func.is_view or "empty" in func.overloadpacket.__name__):
            raise RuntimeError(f"a plan cannot carry out {func}: kernels compute, or its caller")
        return func(*args, **kwargs or {})


def _require_own_memory(results: Sequence[Tensor], places: Sequence[int], num_given: int) -> None:
    for t, place in zip(results, places, strict=True):
        is_whole = t.untyped_storage().nbytes() == t.numel() * t.itemsize
        if not is_whole or place < num_given or places.count(place) > 1:
            raise RuntimeError(f"a result {tuple(t.shape)} of a plan has no memory of its own")


class Plan:
    """What calls of one kind do: memory to take, kernels to start, tensors to return."""

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
        self._make = [_allocation(t.shape, t.stride(), t.dtype, self._device) for t in returned]
        self._reserve(draft, results)
        self._resolve()

    def _reserve(self, draft: _Draft, results: Sequence[int]) -> None:
        """Cut one piece of memory for all that is not returned.

        A call's list of addresses has its tensors', None and the rate, its results', those of the
        memory's parts, and those of views.
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
        self._take_memory = _allocation((end,), (1,), torch.uint8, self._device) if end else None
        order = None, *RATE, *results, *inner
        self._index |= {place: i for i, place in enumerate(order, start=count)}

    def _resolve(self) -> None:
        """Say of each kernel which addresses it takes."""
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
        """Take memory, start the kernels, return the results."""
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
                one.start(stream, *one.compiled, *one.pick(addresses), *one.numbers)
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
        """The tensor, or the number, behind an address."""
        if not isinstance(piece, Piece):
            return whole[self._index[piece]]
        at = self._index[piece.place]
        if at >= len(whole) and memory is not None:
            start = self._offsets[at - len(whole)] + piece.offset
            return memory[start:].view(piece.dtype)
        base = whole[at]
        if piece.offset in (0, base.untyped_storage().nbytes()):  # at its end there is nothing
            return base
        return base.as_strided((1,), (1,), base.storage_offset() + piece.offset // base.itemsize)


def _current_stream(device: int | None) -> int | None:
    """The current stream of a GPU, as its driver knows it; None on the CPU."""
    return None if device is None else torch._C._cuda_getCurrentRawStream(device)


def _allocation(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Return a function that allocates a tensor on a device, which is the current one.

    Inductor's function takes half the time of ``torch.empty_strided``, which parses arguments and
    asks for dispatch modes.
    """
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is None:
        return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    return partial(fast, tuple(shape), tuple(strides), dtype)


_NO_RATE = None, 0.0, 0.0


@lru_cache(maxsize=1024)
def halves(value: float) -> tuple[float, float]:
    """A number as the sum of two that float32 holds; kernels take no float64."""
    high = ctypes.c_float(value).value
    return high, value - high
