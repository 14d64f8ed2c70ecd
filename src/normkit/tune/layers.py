"""The layers of a model that have an example weight: convert torch's, set weights, undo it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.convert import Conversion, convert_norm_
from normkit.convert.rules import has_rule
from normkit.errors import OptionError
from normkit.inference.tracked import callers
from normkit.layers.base import NormLayer, SegmentLayer, TrackingLayer
from normkit.passes import attempt

Weights = float | Mapping[str, float]
"""One example weight for all layers, or one for each layer's name."""


def common_weight(weights: Weights) -> Weights:
    """Return one number if all layers have the same weight, otherwise the weights as given."""
    values = set(weights.values()) if isinstance(weights, Mapping) else {weights}
    return values.pop() if len(values) == 1 else weights


class WeighedLayers:
    """The layers of a model with running statistics, which an example weight can be set for.

    Args:
        model: The model; ``convert_`` and ``set_`` change it.

    Raises:
        OptionError: If the model has no such layer, or is itself a norm of torch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.conversion: Conversion | None = None
        self._replaceable, self.left = _replaceable(model)
        own = _tracking(model)
        if model in self._replaceable:
            raise OptionError(
                f"the model is itself a {type(model).__name__}, which cannot be replaced in place; "
                f"put it into nn.Sequential first"
            )
        if not own and not self._replaceable:
            also = "".join(f"; {name}: {why}" for name, why in self.left.items())
            raise OptionError(
                f"{type(model).__name__} has no BatchNorm and no layer of normkit with running "
                f"statistics, so there is nothing to weigh{also}"
            )
        self._before = {layer: layer.example_weight for layer in own.values()}
        self.named, self.callers = own, callers(model, own)

    def convert_(self) -> None:
        """Replace torch's batch norms by normkit's, which compute the same."""
        if self._replaceable:
            self.conversion = convert_norm_(
                self.model, "bn", where=lambda module, _: module in self._replaceable
            )
        self.named = _tracking(self.model)
        self.callers = callers(self.model, self.named)

    def set_(self, weights: Weights) -> None:
        """Set the weight of every layer."""
        for name, layer in self.named.items():
            layer.example_weight = weights[name] if isinstance(weights, Mapping) else weights

    @property
    def weights(self) -> dict[str, float]:
        """The present weights by layer name."""
        return {name: layer.example_weight for name, layer in self.named.items()}

    @property
    def has_composites(self) -> bool:
        """Whether a layer is inside a composite, whose operator takes weights only as numbers."""
        return any(not isinstance(caller, SegmentLayer) for caller in self.callers)

    def require_in_place(self) -> None:
        """Check that all layers are still in the model.

        Raises:
            OptionError: If the conversion was undone, or layers were replaced.
        """
        modules = set(self.model.modules())
        gone = [name for name, layer in self.named.items() if layer not in modules]
        if gone:
            raise OptionError(
                f"layers {', '.join(map(repr, gone[:5]))} are no longer in the model: the tuning "
                f"was undone, or they were replaced since; tune it again"
            )

    def undo(self) -> nn.Module:
        """Restore torch's layers and the old weights, all or none; return the model."""
        return attempt(self._undo, self.model)

    def _undo(self) -> nn.Module:
        for layer, weight in self._before.items():
            layer.example_weight = weight
        if self.conversion is not None:
            self.conversion.revert()
        return self.model


def _tracking(model: nn.Module) -> dict[str, TrackingLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TrackingLayer) and module.running_mean is not None
    }


def _replaceable(model: nn.Module) -> tuple[set[nn.Module], dict[str, str]]:
    """Find the batch norms that can be replaced by normkit's, and say why others cannot."""
    found: set[nn.Module] = set()
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, NormLayer) or not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None:
            left[name] = "it has no running statistics"
        elif not has_rule(type(module)):
            left[name] = f"{type(module).__name__} is no batch norm that normkit can replace"
        else:
            found.add(module)
    return found, left
