"""Everything that a pass may change in a model, and how it is put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, *, training: bool | None = None) -> Generator[None]:
    """Run the block, then give the model and the random number generators their old states back.

    Put back are modes, buffers (values and objects), ``.grad`` (the objects; add to none of them in
    place) and the states of torch's, Python's and, if it is loaded, NumPy's generators. Hooks and
    parameters are the block's own affair.

    Args:
        model: The model.
        training: Mode of all modules inside the block, set without calling ``train()``, which
            some models override; None leaves it.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> with untouched(norm, training=True):
        ...     _ = norm(torch.randn(2, 3, 4, 4))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    modules = list(model.modules())
    modes = [vars(module).get("training", module.training) for module in modules]  # as it was set
    buffers = [_kept(module) for module in modules]
    grads = [(p, p.grad) for p in model.parameters()]
    with _random_states(_cuda_devices(model)):
        try:
            for module in modules:
                module.training = module.training if training is None else training
            yield
        finally:
            for module, mode, kept in zip(modules, modes, buffers, strict=True):
                module.training = mode
                _put_back(module, kept)
            for parameter, grad in grads:
                parameter.grad = grad


Kept = dict[str, tuple[Tensor | None, Tensor | None]]
"""Buffers of a module by name: the object, and its values."""


def _kept(module: nn.Module) -> Kept:
    return {
        name: (value, None if value is None else value.detach().clone())
        for name, value in module._buffers.items()
    }


@torch.no_grad()
def _put_back(module: nn.Module, kept: Kept) -> None:
    for value, values in kept.values():
        if value is not None and values is not None and not _same(value, values):
            value.copy_(values)
    module._buffers.clear()
    module._buffers.update({name: value for name, (value, _) in kept.items()})


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether nothing has to be written: an expanded or inference tensor cannot be."""
    return a.is_meta or (a.shape == b.shape and torch.equal(a, b))


def _cuda_devices(model: nn.Module) -> list[int]:
    devices = {p.device for p in model.parameters()}
    return sorted(d.index or 0 for d in devices if d.type == "cuda")


@contextmanager
def _random_states(devices: list[int]) -> Generator[None]:
    numpy: Any = sys.modules.get("numpy")
    python, legacy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)
