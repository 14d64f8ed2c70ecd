"""Compute several example weights in one forward, each on its own copy of the batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from normkit.kernels.reference import table_dtype
from normkit.passes.inputs import first_argument
from normkit.tune.layers import WeighedLayers

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOLERANCE_16_BIT = 2e-2
"""Largest difference of outputs that counts as rounding, relative to the largest output."""


class CopiesError(Exception):
    """The model's output for a repeated batch does not consist of one output for each copy."""


@contextmanager
def weighed_by_copy(
    layers: WeighedLayers, alphas: tuple[float, ...], repeat: bool
) -> Generator[None]:
    """Use the ``i``-th weight for the ``i``-th copy of the batch, in every layer.

    Args:
        layers: The layers; their weights are not restored, see ``passes.untouched``.
        alphas: The weights, one for each copy.
        repeat: Whether the first norm repeats its input; otherwise the caller repeats the batch.
    """
    hook = _WeightHook(layers, alphas, repeat)
    with ExitStack() as stack:
        for caller in layers.callers:
            handle = caller.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _WeightHook:
    """A forward pre-hook that gives each layer the weights of its input's examples."""

    def __init__(self, layers: WeighedLayers, alphas: tuple[float, ...], repeat: bool) -> None:
        self.layers, self.alphas = layers, torch.tensor(alphas, dtype=torch.float64)
        self.repeat = repeat
        self.batch_size = 0  # examples of the first norm's input before it is repeated

    def __call__(
        self, caller: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(map(self._repeated, args))  # the input, and possibly a mask
        named = {key: self._repeated(value) for key, value in named.items()}
        weights = self._column(first_argument(args, named))
        for layer in self.layers.callers[caller]:
            layer._example_weight = weights
        return args, named

    def _repeated(self, x: Any) -> Any:
        """Repeat the input of the first norm, and of norms on branches that start before it."""
        if not isinstance(x, Tensor):
            return x
        if self.repeat and x.shape[0] == (self.batch_size or x.shape[0]):
            self.batch_size = x.shape[0]
            return torch.cat([x] * len(self.alphas))
        return x

    def _column(self, x: Tensor) -> Tensor:
        """The weight of each example of an input, ``(N, 1)``."""
        size, rest = divmod(x.shape[0], len(self.alphas))
        if rest:
            raise CopiesError(f"{x.shape[0]} examples are no {len(self.alphas)} copies of a batch")
        alphas = self.alphas.to(x.device, table_dtype(x.dtype))
        return alphas.repeat_interleave(size)[:, None]


def repeated(batch: Any, num_copies: int) -> Any:
    """Repeat every tensor of a batch along the first axis."""
    return tree_map_only(Tensor, lambda t: torch.cat([t] * num_copies) if t.ndim else t, batch)


def split(output: Any, num_copies: int) -> list[Any]:
    """Split a model's output into the outputs of the copies.

    Raises:
        CopiesError: If it holds anything other than tensors that can be split.
    """

    def part(leaf: Any, index: int) -> Any:
        if leaf is None:
            return None
        if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] % num_copies:
            raise CopiesError(f"the output holds {type(leaf).__name__}, which cannot be split")
        return leaf.unflatten(0, (num_copies, -1))[index]

    return [tree_map(lambda leaf, i=i: part(leaf, i), output) for i in range(num_copies)]


def agree(output: Any, expected: Any) -> bool:
    """Whether two outputs differ by no more than rounding."""
    pairs = list(zip(tree_leaves(output), tree_leaves(expected), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return bool(tensors) and all(_close(a, b) for a, b in tensors)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit = TOLERANCE.get(a.dtype, TOLERANCE_16_BIT)
    finite = b[b.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=limit, atol=limit * size, equal_nan=True)
