"""Computing a weight once for all calls of its layer in one forward."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.core.moments import Moments
from normkit.typing import FeatureMap

Result = tuple[FeatureMap, Moments]
Sources = tuple[Tensor | None, ...]


class CachedWeight(NamedTuple):
    """A computed weight with its table of moments, and the tensors it was computed from."""

    sources: Sources
    state: tuple[Any, ...]
    result: Result

    def is_valid_for(self, sources: Sources, state: tuple[Any, ...]) -> bool:
        """Whether the weight was computed from these tensors, and they have not changed since."""
        same = all(a is b for a, b in zip(self.sources, sources, strict=True))
        return same and self.state == state


class WeightCache:
    """Caches computed weights during a forward of ``root``, and clears them when it ends.

    Values are cached without their autograd graph, and every use becomes an autograd node of its
    own. So backward passes may come in any number and order, and gradient checkpointing may
    recompute a part. Because the cache is cleared after each forward of ``root``, changes to a raw
    weight between forwards are always seen. Every thread has its own cache.
    """

    def __init__(self, root: nn.Module) -> None:
        self._by_thread: dict[int, dict[nn.Module, CachedWeight]] = {}
        self._handles = (
            root.register_forward_pre_hook(self._open),
            root.register_forward_hook(self._close, always_call=True),
        )

    def remove(self) -> None:
        """Remove the hooks from the root."""
        for handle in self._handles:
            handle.remove()

    def value(
        self, owner: nn.Module, sources: Sources, compute: Callable[[Result | None], Result]
    ) -> FeatureMap:
        """Return the weight of ``owner``, from the cache if this forward has computed it.

        Args:
            owner: The module that computes the weight.
            sources: The tensors from which the weight is computed.
            compute: Called with None, computes the weight. Called with a cached result, returns it
                as the output of a new autograd node.
        """
        cache = self._by_thread.get(threading.get_ident())
        # Inference tensors have no version counter, so changes to them could not be noticed.
        if cache is None or any(t is not None and t.is_inference() for t in sources):
            return compute(None)[0]
        cached, state = cache.get(owner), _state(sources)
        if cached is not None and cached.is_valid_for(sources, state):
            return compute(cached.result)[0]
        value, table = compute(None)
        cache[owner] = CachedWeight(sources, state, (value.detach(), table))
        return value

    def _open(self, root: nn.Module, arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self._by_thread[threading.get_ident()] = {}

    def _close(self, root: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._by_thread.pop(threading.get_ident(), None)


def _state(sources: Sources) -> tuple[Any, ...]:
    """Return the version counters of the tensors, and whether inference mode is on.

    A weight cached in inference mode cannot be used by autograd outside of it.
    """
    versions = tuple(None if t is None else t._version for t in sources)
    return (*versions, torch.is_inference_mode_enabled())
