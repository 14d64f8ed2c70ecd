"""normkit's layers with the extras that other libraries build into norms.

The extras are an activation after the norm, and inputs with the channels on the last axis. They are
added by subclasses made when needed rather than by wrapper modules, so that the names in a state
dict do not change.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from normkit.convert.source import Activation
from normkit.core.mask import Mask
from normkit.kernels.activations import ActivationName
from normkit.layers.base import NormLayer

ACTIVATED, CHANNELS_LAST = "Act", "ChannelsLast"


class _Adapted(NormLayer):
    """A layer whose class is made at run time from ``base`` and the names of its adapters."""

    base: type[NormLayer]
    kinds: tuple[str, ...]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _empty, (self.base, self.kinds), self.__dict__

    def _lost_by_others(self) -> str | None:
        """What a tool would lose that makes another layer of this one, as of a batch norm."""
        words = {ACTIVATED: "activation module", CHANNELS_LAST: "last axis of channels"}
        return " and ".join(words[kind] for kind in self.kinds)


class _Activated(_Adapted):
    """Applies dropout and an activation to the normalised map."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self, x: Tensor, mask: Mask | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise, apply dropout, apply the activation."""
        return self.act(self.drop(super().forward(x, mask, residual)))

    def __repr__(self) -> str:
        after = Activation(self.drop, self.act).described()
        return f"{super().__repr__()} -> {', '.join(after) or 'nothing'}"


class _ChannelsLast(_Adapted):
    """Takes and returns maps of shape ``(N, *S, C)``."""

    def forward(
        self, x: Tensor, mask: Mask | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise with the last axis as the channels."""
        residual = residual.movedim(-1, 1) if isinstance(residual, Tensor) else residual
        return super().forward(x.movedim(-1, 1), mask, residual).movedim(1, -1)


_KINDS: dict[str, type[_Adapted]] = {CHANNELS_LAST: _ChannelsLast, ACTIVATED: _Activated}


def adapt_(layer: NormLayer, activation: Activation | None, channels_last: bool) -> NormLayer:
    """Give one of normkit's layers the activation and axis order of the layer that it replaces."""
    kinds = [CHANNELS_LAST] if channels_last else []
    if activation is not None:
        kinds.append(ACTIVATED)
        layer.drop, layer.act = activation
    if kinds:
        layer.__class__ = _class(type(layer), tuple(kinds))  # type: ignore[assignment]
    return layer


def base_of(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer without its adapters."""
    return layer.base if isinstance(layer, _Adapted) else type(layer)


def adapters_of(layer: nn.Module) -> tuple[Activation | None, bool]:
    """Return the activation of a layer, if any, and whether its channels are on the last axis."""
    kinds = layer.kinds if isinstance(layer, _Adapted) else ()
    activation = Activation(layer.drop, layer.act) if isinstance(layer, _Activated) else None
    return activation, CHANNELS_LAST in kinds


def modules_after(norm: nn.Module, activation: Activation | None) -> dict[str, nn.Module]:
    """What a norm of any library does after normalising, by name, in the order of its forward."""
    found: dict[str, nn.Module] = {}
    if isinstance(norm, NormLayer) and norm.activation is not None:
        found["activation"] = _module_of(norm.activation, norm.negative_slope)
    if activation is not None:
        found |= {"drop": activation.drop, "act": activation.act}
    return found


def _module_of(name: ActivationName, negative_slope: float) -> nn.Module:
    """The activation of a layer as a module of torch."""
    kinds: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish,
        "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu6": nn.ReLU6,
    }  # fmt: skip
    return nn.LeakyReLU(negative_slope) if name == "leaky_relu" else kinds[name]()


@cache
def _class(base: type[NormLayer], kinds: tuple[str, ...]) -> type[NormLayer]:
    parents = (*(_KINDS[kind] for kind in reversed(kinds)), base)
    attributes = {"base": base, "kinds": kinds, "__module__": __name__}
    return type(base.__name__ + "".join(kinds), parents, attributes)


def _empty(base: type[NormLayer], kinds: tuple[str, ...]) -> NormLayer:
    """Create a layer without state, for copying and unpickling."""
    return object.__new__(_class(base, kinds))
