"""The batches of a measurement, and sending all of them through a model."""

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
    """The batches that a measurement reads, and how they are sent through a model.

    Args:
        batches: An iterable of batches.
        forward: Sends one batch through the model.
        max_batches: Largest number of batches to read; None reads all.
        group: Process group over whose batches the measurement is taken; None is this process.
        name: Name of the user's argument, for error texts.
    """

    batches: Iterable[Any]
    forward: Forward = forward_batch
    max_batches: int | None = None
    group: dist.ProcessGroup | None = None
    name: str = "batches"

    def read(self) -> Iterator[Any]:
        """Iterate over the batches, at most ``max_batches`` of them."""
        return islice(iterate(self.batches, self.name), self.max_batches)

    def total(self) -> int | None:
        """Return the number of batches, or None if it is unknown before they are read."""
        try:
            size = len(self.batches)  # type: ignore[arg-type]
        except TypeError:  # a DataLoader has __len__, which raises if its data set has no length
            return self.max_batches
        return min(size, self.max_batches or size)

    def each(self, model: nn.Module, what: str) -> Iterator[Any]:
        """Iterate over the batches on the model's device, and show progress labelled ``what``."""
        device = device_of(model)
        return (moved(batch, device) for batch in progress(self.read(), what, self.total()))

    def send(self, model: nn.Module, what: str) -> int:
        """Send all batches through a model without gradients; return their number.

        The modes of the modules are not changed.
        """
        num_batches = 0
        with uncompiled(), torch.no_grad():
            for batch in self.each(model, what):
                self.forward(model, batch)
                num_batches += 1
        return num_batches


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly inside the block, so that their hooks are called."""
    # Without torch._dynamo nothing can have been compiled, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
