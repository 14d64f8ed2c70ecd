"""A weight that several calls of one forward use is computed once."""

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


class Kept(NamedTuple):
    """What a weight became, and what it was made of."""

    sources: Sources
    state: tuple[Any, ...]
    result: Result

    def is_of(self, sources: Sources, state: tuple[Any, ...]) -> bool:
        """Whether these very tensors, unchanged since, made the result."""
        same = all(a is b for a, b in zip(self.sources, sources, strict=True))
        return same and self.state == state


class OncePerForward:
    """Keeps computed weights while a forward of ``root`` runs, and forgets them when it ends.

    Values are kept, not their graph: every use is a node of its own, so backward passes may come
    in any number and order, and a checkpoint may compute a part again. Nothing is kept outside
    of a forward of the root, so a weight that was changed by any means is seen by the next one.
    Every thread has its own forward.
    """

    def __init__(self, root: nn.Module) -> None:
        self._kept: dict[int, dict[nn.Module, Kept]] = {}
        self._handles = (
            root.register_forward_pre_hook(self._open),
            root.register_forward_hook(self._close, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks off the root."""
        for handle in self._handles:
            handle.remove()

    def value(
        self, owner: nn.Module, sources: Sources, compute: Callable[[Result | None], Result]
    ) -> FeatureMap:
        """Compute the weight of ``owner``, or only its gradient if this forward knows the value.

        Args:
            owner: Whose weight it is.
            sources: What it is made of.
            compute: Makes the result; given a result that is known, makes it again as a new node.
        """
        forward = self._kept.get(threading.get_ident())
        if forward is None or any(t is not None and t.is_inference() for t in sources):
            return compute(None)[0]
        kept, state = forward.get(owner), _state(sources)
        if kept is not None and kept.is_of(sources, state):
            return compute(kept.result)[0]
        value, table = compute(None)
        forward[owner] = Kept(sources, state, (value.detach(), table))
        return value

    def _open(self, root: nn.Module, arguments: Any) -> None:  # noqa: ANN401
        if not torch.compiler.is_compiling():
            self._kept[threading.get_ident()] = {}

    def _close(self, root: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ANN401
        if not torch.compiler.is_compiling():
            self._kept.pop(threading.get_ident(), None)


def _state(sources: Sources) -> tuple[Any, ...]:
    """What must not have changed: the tensors' contents, and whether autograd can use the value."""
    versions = tuple(None if t is None else t._version for t in sources)
    return (*versions, torch.is_inference_mode_enabled())
