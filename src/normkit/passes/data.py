"""All batches of a measurement, once through a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from normkit.passes.batches import Forward, device_of, forward_batch, iterate, moved
from normkit.passes.progress import progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Batches, how they go through a model, and who else has some.

    Args:
        batches: What is measured.
        forward: How a batch goes through the model.
        max_batches: How many at most.
        group: Ranks whose batches count as well.
        name: What the user calls the batches.
    """

    batches: Iterable[Any]
    forward: Forward = forward_batch
    max_batches: int | None = None
    group: dist.ProcessGroup | None = None
    name: str = "batches"

    def read(self) -> Iterator[Any]:
        """Give the batches, not more than ``max_batches``."""
        return islice(iterate(self.batches, self.name), self.max_batches)

    def total(self) -> int | None:
        """Count the batches, if that can be done without reading them."""
        try:
            size = len(self.batches)  # type: ignore[arg-type]
        except TypeError:  # also a loader whose data set does not know its length
            return self.max_batches
        return min(size, self.max_batches or size)

    def each(self, model: nn.Module, what: str) -> Iterator[Any]:
        """Give the batches on the model's device, and say how far it is with ``what``."""
        device = device_of(model)
        return (moved(batch, device) for batch in progress(self.read(), what, self.total()))

    def send(self, model: nn.Module, what: str) -> int:
        """Send all through a model as it is, without gradients; return how many there were."""
        num_batches = 0
        with uncompiled(), torch.no_grad():
            for batch in self.each(model, what):
                self.forward(model, batch)
                num_batches += 1
        return num_batches


def uncompiled() -> AbstractContextManager[Any]:
    """Let compiled modules run as they are written, so that hooks see what goes in and out."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
