"""Output noise: what a network makes of norms that are not exact."""

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
from normkit.inference.known import own_forward, takes_input_as_it_is
from normkit.inference.tracked import Where, chosen, reasons, valid_positions
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
        OptionError: If there is no norm, ``std`` is negative, the granularity is unknown, the model
            is compiled, or a draw for each group is wanted of a class with its own forward, of
            which it is not known where its channels are.

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
    modules = unwrap(model, "disturb").named_modules()
    require_uncompiled(model, "disturb")
    norms = {name: module for name, module in modules if is_norm(module)}
    inner = tuple(f"{name}." for name in norms if name)
    outer = {name: module for name, module in norms.items() if not name.startswith(inner)}
    layers = chosen(outer, where)
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
    """What is added to outputs of norms in training."""

    mean: float
    std: float
    granularity: Granularity

    def put_into(self, layer: nn.Module, hooks: Hooks) -> None:
        """Add it before the activation that some layers have inside, else after the layer."""
        children = dict(layer.named_children())
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
            return y + self._drawn(y.shape, y)
        maps = channels_first(layer, y)
        noise = _over_channels(self._drawn(_shape_of_groups(maps, layer), y), maps)
        if maps.ndim > y.ndim:  # an example without a batch axis
            return y + noise[0]
        return y + (noise if maps.shape == y.shape else noise.movedim(1, -1))

    def _drawn(self, shape: tuple[int, ...], y: Tensor) -> Tensor:
        return torch.randn(shape, device=y.device, dtype=y.dtype) * self.std + self.mean


def _require_channels(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers of which nobody knows where their channels are.

    Raises:
        OptionError: With the way out.
    """
    unknown = {
        name: own_forward(layer)
        for name, layer in layers.items()
        if isinstance(layer, NORMS) and not takes_input_as_it_is(layer)
    }
    if unknown:
        raise OptionError(
            f"granularity='group' draws for channels, which cannot be found in the output of "
            f"{reasons(unknown)}; pass granularity='element', or leave the layer out with where="
        )


def _shape_of_groups(y: Tensor, layer: nn.Module) -> tuple[int, ...]:
    groups = getattr(layer, "num_groups", None) or y.shape[1]
    groups = groups if y.shape[1] % groups == 0 else y.shape[1]
    return (y.shape[0], groups, *([1] * (y.ndim - 2)))


def _over_channels(noise: Tensor, y: Tensor) -> Tensor:
    return noise.repeat_interleave(y.shape[1] // noise.shape[1], dim=1)
