"""Add noise to the outputs of norms, to see how a network trains with inexact norms."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from normkit.core.check import require_choice
from normkit.diagnostics.channel_difference import channels_first
from normkit.errors import OptionError
from normkit.inference.norm_classes import describe_own_forward, normalizes_its_input
from normkit.inference.tracked import Where, reasons, select_layers, valid_positions
from normkit.passes import Hooks, TemporaryHook, block_with_cleanup, require_uncompiled, unwrap
from normkit.tracing import is_norm
from normkit.tracing.kinds import NORMS

Granularity = Literal["group", "element"]


def add_output_noise(
    model: nn.Module,
    *,
    mean: float = 1e-3,
    std: float = 1.001,
    granularity: Granularity = "group",
    where: Where | None = None,
) -> AbstractContextManager[tuple[str, ...]]:
    r"""Run the block with Gaussian noise on the outputs of norms in training mode.

    .. math::  y \leftarrow y + \epsilon, \quad \epsilon \sim N(m, s^2)

    The noise is added after scale and shift and before the activation, also if the layer contains
    the activation. It comes from torch's random generator, as dropout's draws do.

    Args:
        model: Holds norms of any library.
        mean: Mean of the noise.
        std: Standard deviation of the noise.
        granularity: ``"group"``: one draw for each example and channel group (for a layer without
            ``num_groups``, each channel), as in the authors' code; ``"element"``: one for each
            value.
        where: ``where(layer, name)`` chooses the norms; by default all.

    Returns:
        A context manager that gives the names of the norms. It removes all hooks at its end, also
        after Ctrl-C.

    Raises:
        OptionError: If there is no norm, ``std`` is negative, the granularity is unknown, the model
            is compiled, or ``"group"`` is given and a norm's class has its own forward, so that
            its channel axis is unknown.

    Source:
        Gunawan, Yin & Zhang, Understanding and Improving Group Normalization, sections 3.2.1, A.2.

    Example:
        >>> norm = nn.GroupNorm(2, 6)
        >>> x = torch.zeros(3, 6, 4, 4)
        >>> with add_output_noise(norm):
        ...     y = norm(x)
        >>> y.unique().numel(), norm(x).unique().numel()  # a draw for each example and group
        (6, 1)
    """
    require_choice("granularity", granularity, get_args(Granularity))
    if std < 0:
        raise OptionError(f"std={std} was given; give a standard deviation of 0 or more")
    modules = unwrap(model, "disturb").named_modules()
    require_uncompiled(model, "disturb")
    norms = {name: module for name, module in modules if is_norm(module)}
    inner = tuple(f"{name}." for name in norms if name)
    outer = {name: module for name, module in norms.items() if not name.startswith(inner)}
    layers = select_layers(outer, where)
    if not layers:
        raise OptionError(f"{type(model).__name__} has no norm, so there is nothing to disturb")

    if granularity == "group":
        _require_channels(layers)
    noise, hooks = _Noise(mean, std, granularity), Hooks()

    def begin() -> tuple[str, ...]:
        for layer in layers.values():
            noise.put_into(layer, hooks)
        return tuple(layers)

    return block_with_cleanup(begin, hooks.remove)


class _Noise(NamedTuple):
    """Noise that is added to the outputs of norms in training mode."""

    mean: float
    std: float
    granularity: Granularity

    def put_into(self, layer: nn.Module, hooks: Hooks) -> None:
        """Add the noise behind the layer, or before the activation that the layer contains."""
        children = dict(layer.named_children())
        # These are the names in timm's norms with an activation; dropout comes before it.
        inside = children.get("drop", children.get("act"))
        if inside is not None:
            hooks.before(inside, TemporaryHook(partial(self._before, layer)))
        else:
            hooks.after(layer, TemporaryHook(self._after), with_kwargs=True)

    def _before(
        self, layer: nn.Module, _inner: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        return (self._noisy(args[0], layer), *args[1:]) if layer.training else None

    def _after(
        self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Tensor
    ) -> Tensor | None:
        if not layer.training:
            return None
        valid = valid_positions(layer, y, args, named)
        noisy = self._noisy(y, layer)
        return noisy if valid is None else torch.where(valid, noisy, y)

    def _noisy(self, y: Tensor, layer: nn.Module) -> Tensor:
        if self.granularity == "element":
            return y + self._draw(y.shape, y)
        maps = channels_first(layer, y)
        groups = getattr(layer, "num_groups", None) or maps.shape[1]
        groups = groups if maps.shape[1] % groups == 0 else maps.shape[1]
        noise = self._draw((maps.shape[0], groups, *([1] * (maps.ndim - 2))), y)
        noise = noise.repeat_interleave(maps.shape[1] // groups, dim=1)
        if maps.ndim > y.ndim:  # The output is one example without a batch axis.
            return y + noise[0]
        return y + (noise if maps.shape == y.shape else noise.movedim(1, -1))

    def _draw(self, shape: tuple[int, ...], y: Tensor) -> Tensor:
        return torch.randn(shape, device=y.device, dtype=y.dtype) * self.std + self.mean


def _require_channels(layers: Mapping[str, nn.Module]) -> None:
    """Refuse norms whose channel axis is unknown, because their class has its own forward.

    Raises:
        OptionError: If there is such a norm.
    """
    unknown = {
        name: describe_own_forward(layer)
        for name, layer in layers.items()
        if isinstance(layer, NORMS) and not normalizes_its_input(layer)
    }
    if unknown:
        raise OptionError(
            f"granularity='group' draws noise for groups of channels, but it is unknown which axis "
            f"of the output holds the channels: {reasons(unknown)}; pass granularity='element', or "
            f"leave the layer out with where="
        )
