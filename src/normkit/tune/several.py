"""One forward for several example weights: each weight has its own copy of the batch."""

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

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest output; 2e-2 for 16 bits


class CopiesError(Exception):
    """What a model gives for a repeated batch is not one output for each copy."""


@contextmanager
def weighed_by_copy(
    layers: WeighedLayers, alphas: tuple[float, ...], repeat: bool
) -> Generator[None]:
    """Let the ``i``-th copy of the batch have the ``i``-th weight in every layer.

    Args:
        layers: The layers; their weights are not put back, see ``passes.untouched``.
        alphas: Weights, one a copy.
        repeat: Whether layers repeat what reaches them once; otherwise it comes repeated.
    """
    weigh = _Weigher(layers, alphas, repeat)
    with ExitStack() as stack:
        for caller in layers.callers:
            handle = caller.register_forward_pre_hook(weigh, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _Weigher:
    """Gives each layer the weights of the examples that it is about to see."""

    def __init__(self, layers: WeighedLayers, alphas: tuple[float, ...], repeat: bool) -> None:
        self.layers, self.alphas = layers, torch.tensor(alphas, dtype=torch.float64)
        self.repeat, self.num_single = repeat, 0  # examples that reach the first norm

    def __call__(
        self, caller: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(map(self._copies, args))  # the input, and a mask
        named = {key: self._copies(value) for key, value in named.items()}
        weights = self._column(first_argument(args, named))
        for layer in self.layers.callers[caller]:
            layer._example_weight = weights
        return args, named

    def _copies(self, x: Any) -> Any:  # noqa: ANN401 - whatever a norm is given
        """Repeat the first norm's input, and that of a norm on a branch that passes it by."""
        if not isinstance(x, Tensor):
            return x
        if self.repeat and x.shape[0] == (self.num_single or x.shape[0]):
            self.num_single = x.shape[0]
            return torch.cat([x] * len(self.alphas))
        return x

    def _column(self, x: Tensor) -> Tensor:
        copies, rest = divmod(x.shape[0], len(self.alphas))
        if rest:
            raise CopiesError(f"{x.shape[0]} examples are no {len(self.alphas)} copies of a batch")
        alphas = self.alphas.to(x.device, table_dtype(x.dtype))
        return alphas.repeat_interleave(copies)[:, None]


def repeated(batch: Any, num_copies: int) -> Any:  # noqa: ANN401 - whatever a batch is
    """A batch with every tensor of it repeated along the first axis."""
    return tree_map_only(Tensor, lambda t: torch.cat([t] * num_copies) if t.ndim else t, batch)


def split(output: Any, num_copies: int) -> list[Any]:  # noqa: ANN401
    """The output of each copy.

    Raises:
        CopiesError: If it holds anything that has no copies.
    """

    def part(leaf: Any, index: int) -> Any:  # noqa: ANN401
        if leaf is None:
            return None
        if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] % num_copies:
            raise CopiesError(f"the output holds {type(leaf).__name__}, which is not in copies")
        return leaf.unflatten(0, (num_copies, -1))[index]

    return [tree_map(lambda leaf, i=i: part(leaf, i), output) for i in range(num_copies)]


def agree(output: Any, expected: Any) -> bool:  # noqa: ANN401
    """Whether two outputs are the same but for rounding."""
    pairs = list(zip(tree_leaves(output), tree_leaves(expected), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return bool(tensors) and all(_close(a, b) for a, b in tensors)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit = TOLERANCE.get(a.dtype, 2e-2)
    finite = b[b.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=limit, atol=limit * size, equal_nan=True)
