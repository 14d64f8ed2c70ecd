"""The loss of each picture of a detector, which gives losses in training mode only."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import DataError
from normkit.inference.tracked import keeps_statistics
from normkit.layers.base import NormLayer
from normkit.passes import device_of
from normkit.tune.metrics import Metric

SEED = 0  # a detector draws the boxes that its losses are taken of


def losses_of_pictures(model: nn.Module, batch: Any) -> Tensor:
    """The sum of a detector's own losses for each picture, ``(n,)``; norms and dropout evaluate.

    Each picture is sent alone, because a detector's losses are means over all boxes of its batch.
    The random boxes among them are those of one seed.

    Args:
        model: Called as ``model(pictures, targets)``; in training mode it gives a dict of losses,
            as torchvision's detectors do.
        batch: Lists of pictures and of their targets.

    Raises:
        DataError: If the model gives something else.
    """
    device = device_of(model)
    used = [device] if device is not None and device.type == "cuda" else []
    with _losses_given(model), torch.random.fork_rng(devices=used):
        return torch.stack([_loss(model, *pair) for pair in zip(*batch[:2], strict=True)])


OWN_LOSSES = Metric(
    name="the detector's losses", score=lambda losses, _: losses, larger_is_better=False
)


def _loss(model: nn.Module, picture: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    torch.manual_seed(SEED)
    losses = model([picture], [target])
    if not isinstance(losses, Mapping) or not losses:
        raise DataError(
            f"{type(model).__name__} gave a {type(losses).__name__} for a picture and its target "
            f"in training mode, where detectors give a dict of losses; pass loss= and forward="
        )
    return torch.stack([*losses.values()]).sum()


@contextmanager
def _losses_given(model: nn.Module) -> Generator[None]:
    """Let the parts that hold others give losses in the block; norms and dropout hold none."""
    modes = {module: module.training for module in model.modules()}
    evaluated = {
        inner
        for module in modes
        if isinstance(module, NormLayer) or keeps_statistics(module)
        for inner in module.modules()
    }
    try:
        for module in modes:
            module.training = module not in evaluated and any(True for _ in module.children())
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def are_of_detectors(batches: Sequence[Any]) -> bool:
    """Whether batches are lists of pictures, and lists of targets that are dicts."""
    first = batches[0] if batches else None
    if not isinstance(first, tuple | list) or len(first) < 2:
        return False
    return all(
        isinstance(given, tuple | list) and bool(given) and isinstance(given[0], kind)
        for given, kind in zip(first, (Tensor, Mapping), strict=False)
    )
