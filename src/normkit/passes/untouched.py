"""A block that restores a model when it ends."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from normkit.passes.cleanup import block_with_cleanup
from normkit.passes.snapshot import Snapshot


def untouched(model: nn.Module, *, training: bool | None = None) -> AbstractContextManager[None]:
    """Run the block, then restore the model and the random number generators.

    Restored is what a ``Snapshot`` saves: modes, buffers (values and objects), the ``.grad``
    objects, hooks, and the states of the random generators of torch, Python and, if it is loaded,
    NumPy. Not restored are the values inside a ``.grad`` tensor, the values of large parameters,
    and attributes of the user's own classes: the block must not change these.

    Args:
        model: The model.
        training: Mode of all modules inside the block; None keeps each module's mode. The mode is
            set without calling ``train()``, because some models override that.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm2d(3)
        >>> with untouched(norm, training=True):
        ...     _ = norm(torch.randn(2, 3, 4, 4))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    before = Snapshot(model, attributes=False)

    def begin() -> None:
        if training is not None:
            for module in model.modules():
                module.training = training

    return block_with_cleanup(begin, before.put_back)
