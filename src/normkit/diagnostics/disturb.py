"""Disturb running statistics, to see how sensitive a network is to errors in them."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from normkit.core.check import require_share
from normkit.errors import OptionError
from normkit.inference.tracked import Where, select_layers, statistics_of, tracked
from normkit.layers.base import BUFFERS
from normkit.passes import block_with_cleanup, unwrap


def disturb_statistics(
    model: nn.Module, delta: float, *, seed: int = 0, where: Where | None = None
) -> AbstractContextManager[tuple[str, ...]]:
    r"""Run the block with disturbed running statistics, then put them back.

    .. math::  \hat\mu_c \leftarrow \hat\mu_c (1 + d_c), \quad
               \hat\sigma_c^2 \leftarrow \hat\sigma_c^2 (1 + d'_c), \quad
               d, d' \sim U(-\Delta, \Delta)

    independently for every channel. The draws for a layer depend only on its name and the seed,
    not on which other layers are disturbed.

    Args:
        model: Holds norms of torch or normkit with running statistics.
        delta: Largest relative error, from 0 to 1.
        seed: Seed of the draws; the paper averages over five seeds.
        where: ``where(layer, name)`` chooses the layers to disturb; by default all. The paper
            takes the first batch norm of each of the first six blocks.

    Returns:
        A context manager that gives the names of the disturbed layers. It restores the buffers in
        full, also after Ctrl-C; any other change that the block makes to the model stays.

    Raises:
        OptionError: If ``delta`` lies outside 0 to 1, or there is no layer to disturb; then
            nothing is changed.

    Source:
        Huang et al., Delving into the Estimation Shift of Batch Normalization in a Network, eq. 5.

    Example:
        >>> norm = nn.BatchNorm2d(6).eval()
        >>> with disturb_statistics(norm, 0.5):
        ...     bool((norm.running_var != 1).all())
        True
        >>> bool((norm.running_var == 1).all())
        True
    """
    require_share("delta", delta)
    layers = select_layers(tracked(unwrap(model, "disturb")), where)
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no layer with running statistics, so there is nothing to "
            f"disturb"
        )
    buffers = [b for layer in layers.values() for b in statistics_of(layer).values()]
    before: dict[Tensor, Tensor] = {}

    def begin() -> tuple[str, ...]:
        before.update({buffer: buffer.detach().clone() for buffer in buffers})
        for name, layer in layers.items():
            _disturb_(layer, delta, _generator(seed, name))
        return tuple(layers)

    def put_back() -> None:
        for buffer, values in before.items():
            buffer.detach().copy_(values)

    return block_with_cleanup(begin, put_back)


def _disturb_(layer: nn.Module, delta: float, generator: torch.Generator) -> None:
    for name in BUFFERS:
        buffer = statistics_of(layer)[name]
        draw = torch.rand(buffer.shape, generator=generator, dtype=torch.float64) * 2 - 1
        buffer.detach().mul_((1 + delta * draw).to(buffer))


def _generator(seed: int, name: str) -> torch.Generator:
    """Make a generator whose draws depend only on the seed and the layer's name."""
    # Python's ``hash`` of a text differs from process to process; a seed has at most 64 bits.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
