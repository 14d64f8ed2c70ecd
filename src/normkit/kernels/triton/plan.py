"""Plans: what does not change from call to call, worked out once for each kind of call.

A kind is everything that a kernel is compiled for or that decides how a map is cut: shapes,
strides, dtypes, the device, options, and which pointers are 16-byte aligned, which triton compiles
for. A call then looks its plan up, allocates, and starts compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from normkit.kernels.triton.streams import moments_kernel

INTERPRETED = not isinstance(moments_kernel, triton.JITFunction)
"""Whether the kernels were defined under ``TRITON_INTERPRET=1``, to run on the CPU."""
MOST_PLANS = 1024
"""Of one operator; then the oldest goes: shapes that change with each call must not fill memory."""
ALIGNMENT = 16  # bytes that triton compiles pointers for


class Plans(dict[Hashable, Any]):
    """Plans of one operator, by kind."""

    def find(self, kind: Hashable, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """The plan of a kind, made where there is none."""
        found = self.get(kind)
        if found is None:
            if len(self) >= MOST_PLANS:
                del self[next(iter(self))]
            found = self[kind] = make()
        return found


def alignment(*tensors: Tensor | None) -> Hashable:
    """Which addresses are aligned: 0 where all are, as those of whole tensors."""
    bits = 0
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr()
    if bits % ALIGNMENT == 0:
        return 0
    return tuple(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)


def dtype_of(t: Tensor | None) -> torch.dtype | None:
    """Dtype of a tensor that may be absent."""
    return None if t is None else t.dtype


class Launch:
    """One kernel of a plan: all but the tensors is known.

    The first start goes by way of triton, which compiles; the others start what it has compiled.
    Tensors are a kernel's first arguments, numbers follow, constants come last.

    Args:
        kernel: Compiled by triton, or interpreted.
        num_programs: How many run.
        numbers: Arguments after the tensors.
        num_warps: Of a program.
        constants: What the kernel is compiled for, by name.
    """

    __slots__ = ("constants", "grid", "kernel", "num_warps", "numbers", "start", "tail")

    def __init__(
        self,
        kernel: Any,  # noqa: ANN401
        num_programs: int,
        numbers: tuple[object, ...],
        num_warps: int = 4,
        **constants: Any,  # noqa: ANN401
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, (num_programs, 1, 1), numbers
        self.num_warps, self.constants = num_warps, constants
        self.start: Callable[..., object] | None = None
        self.tail: tuple[object, ...] = ()

    def __call__(self, stream: int | None, *tensors: Tensor | None) -> None:
        """Start the kernel on a stream of the current device."""
        if self.start is None:
            self._first(tensors)
        else:
            self.start(*tensors, *self.tail, stream=stream)

    def _first(self, tensors: tuple[Tensor | None, ...]) -> None:
        compiled = self.kernel[self.grid](
            *tensors, *self.numbers, **self.constants, num_warps=self.num_warps
        )
        if INTERPRETED:
            return
        names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
        self.tail = (*self.numbers, *(self.constants[name] for name in names))
        self.start = compiled[self.grid]


def current_stream(device: int) -> int | None:
    """The current stream of a GPU, as its driver knows it; None on the CPU."""
    return None if device < 0 else torch._C._cuda_getCurrentRawStream(device)


def on_device(device: int) -> AbstractContextManager[object]:
    """Make a GPU the current one, where it is not."""
    if device < 0 or torch._C._cuda_getDevice() == device:
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = nullcontext()
