"""Output noise: what a network makes of norms that are not exact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normkit.core.check import require_choice
from normkit.errors import OptionError
from normkit.inference.tracked import Where, bare, chosen
from normkit.passes import Hooks, between
from normkit.tracing import is_norm

Granularity = Literal["group", "element"]


def add_output_noise(
    model: nn.Module,
    *,
    mean: float = 1e-3,
    std: float = 1.001,
    granularity: Granularity = "group",
    where: Where | None = None,
) -> AbstractContextManager[tuple[str, ...]]:
    r"""Run the block with Gaussian noise on what norms put out in training.

    .. math::  y \leftarrow y + \epsilon, \quad \epsilon \sim N(m, s^2)

    after scale and shift and before the activation, also where the layer has that inside, and only
    in training mode. The noise comes from torch's generator, as that of dropout does.

    Args:
        model: Holds norms of any library.
        mean: Of the noise.
        std: Standard deviation of the noise.
        granularity: ``"group"``: one draw for each example and channel group (of a layer without
            ``num_groups``, each channel), as in the authors' code; ``"element"``: one for each
            value.
        where: ``where(layer, name)`` says which norms are meant; by default all.

    Returns:
        The block's context manager, which gives the names of the norms. No hook is left, also when
        Ctrl-C comes meanwhile.

    Raises:
        OptionError: If there is no norm, ``std`` is negative, or the granularity is unknown.

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
        raise OptionError(f"std={std} was given; a standard deviation is at least 0")
    norms = {name: module for name, module in bare(model).named_modules() if is_norm(module)}
    inner = tuple(f"{name}." for name in norms if name)
    outer = {name: module for name, module in norms.items() if not name.startswith(inner)}
    layers = chosen(outer, where)
    if not layers:
        raise OptionError(f"{type(model).__name__} has no norm, so there is nothing to disturb")

    def noisy(y: Tensor, layer: nn.Module) -> Tensor:
        shape = y.shape if granularity == "element" else _shape_of_groups(y, layer)
        noise = torch.randn(shape, device=y.device, dtype=y.dtype) * std + mean
        return y + _over_channels(noise, y)

    hooks = Hooks()

    def begin() -> tuple[str, ...]:
        for layer in layers.values():
            _hook(hooks, layer, noisy)
        return tuple(layers)

    return between(begin, hooks.remove)


def _hook(hooks: Hooks, layer: nn.Module, noisy: Callable[[Tensor, nn.Module], Tensor]) -> None:
    """Put the noise before the activation that some layers have inside, else after the layer."""

    def before(_inner: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (noisy(args[0], layer), *args[1:]) if layer.training else None

    def after(_layer: nn.Module, _args: Any, y: Tensor) -> Tensor | None:  # noqa: ANN401
        return noisy(y, layer) if layer.training else None

    children = dict(layer.named_children())
    inside = children.get("drop", children.get("act"))
    if inside is not None:
        hooks.before(inside, before)
    else:
        hooks.after(layer, after)


def _shape_of_groups(y: Tensor, layer: nn.Module) -> tuple[int, ...]:
    groups = getattr(layer, "num_groups", None) or y.shape[1]
    groups = groups if y.shape[1] % groups == 0 else y.shape[1]
    return (y.shape[0], groups, *([1] * (y.ndim - 2)))


def _over_channels(noise: Tensor, y: Tensor) -> Tensor:
    return noise.repeat_interleave(y.shape[1] // noise.shape[1], dim=1)
