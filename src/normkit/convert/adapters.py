"""Our layers with what other libraries keep inside theirs: an activation, another axis order.

They are subclasses made when needed, not wrappers, so that the names in a state dict stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from normkit.convert.source import Activation
from normkit.core.mask import Mask
from normkit.layers.base import NormLayer

ACTIVATED, CHANNELS_LAST = "Act", "ChannelsLast"


class _Adapted(NormLayer):
    """A layer whose class is made at run time, from what it is based on."""

    base: type[NormLayer]
    kinds: tuple[str, ...]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _empty, (self.base, self.kinds), self.__dict__


class _Activated(_Adapted):
    """Drops and activates the normalised map."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self, x: Tensor, mask: Mask | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise, drop, activate."""
        return self.act(self.drop(super().forward(x, mask, residual)))

    def __repr__(self) -> str:
        return f"{super().__repr__()} -> {', '.join(self._after()) or 'nothing'}"

    def _after(self) -> tuple[str, ...]:
        return tuple(Activation(self.drop, self.act).described())


class _ChannelsLast(_Adapted):
    """Takes and gives ``(N, *S, C)``."""

    def forward(
        self, x: Tensor, mask: Mask | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise with the last axis as the channels."""
        residual = residual.movedim(-1, 1) if isinstance(residual, Tensor) else residual
        return super().forward(x.movedim(-1, 1), mask, residual).movedim(1, -1)


_KINDS: dict[str, type[_Adapted]] = {CHANNELS_LAST: _ChannelsLast, ACTIVATED: _Activated}


def adapt_(layer: NormLayer, activation: Activation | None, channels_last: bool) -> NormLayer:
    """Give a layer of ours the activation and axis order of the one that it replaces."""
    kinds = [CHANNELS_LAST] if channels_last else []
    if activation is not None:
        kinds.append(ACTIVATED)
        layer.drop, layer.act = activation
    if kinds:
        layer.__class__ = _class(type(layer), tuple(kinds))  # type: ignore[assignment]
    return layer


def base_of(layer: nn.Module) -> type[nn.Module]:
    """Class of a layer without its adapters."""
    return layer.base if isinstance(layer, _Adapted) else type(layer)


def adapters_of(layer: nn.Module) -> tuple[Activation | None, bool]:
    """Activation of a layer of ours, and whether its channels come last."""
    kinds = layer.kinds if isinstance(layer, _Adapted) else ()
    activation = Activation(layer.drop, layer.act) if isinstance(layer, _Activated) else None
    return activation, CHANNELS_LAST in kinds


@cache
def _class(base: type[NormLayer], kinds: tuple[str, ...]) -> type[NormLayer]:
    parents = (*(_KINDS[kind] for kind in reversed(kinds)), base)
    attributes = {"base": base, "kinds": kinds, "__module__": __name__}
    return type(base.__name__ + "".join(kinds), parents, attributes)


def _empty(base: type[NormLayer], kinds: tuple[str, ...]) -> NormLayer:
    """Make a layer without state, for copying and unpickling."""
    kind = _class(base, kinds)
    new: Callable[[type[NormLayer]], NormLayer] = object.__new__
    return new(kind)
