"""A pass through a model that leaves it as it was."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from normkit.passes.finish import between
from normkit.passes.snapshot import Snapshot


def untouched(model: nn.Module, *, training: bool | None = None) -> AbstractContextManager[None]:
    """Run the block, then make the model and the random number generators what they were before.

    Put back is what a ``Snapshot`` holds: modes, buffers (values and objects), ``.grad`` (the
    objects; add to none of them in place), hooks, and the states of torch's, Python's and, if it is
    loaded, NumPy's generators. Values of large parameters, and attributes of the user's own
    classes, are the block's own affair.

    Args:
        model: The model.
        training: Mode of all modules inside the block, set without calling ``train()``, which
            some models override; None leaves it.

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

    return between(begin, before.put_back)
