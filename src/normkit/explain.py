"""Explaining what a layer does with an input: its statistics groups and its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from normkit.core.check import require_feature_map
from normkit.kernels.select import NAMES, Decision, Kernels, decide, details
from normkit.layers.base import NormLayer
from normkit.sharing import Part, parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How a layer computes the output for an input.

    Args:
        layer: Name of the layer's class.
        kernels: The kernels that compute it.
        reason: Why these kernels are used.
        groups: The elements of one statistics group, in the layer's current mode, in words.
        parts: The statistics groups as objects; ``index`` gives the group of each element.
    """

    layer: str
    kernels: Kernels
    reason: str
    groups: str
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return f"{self.layer}: {self.groups}\n{self.kernels} kernels: {self.reason}"


def explain(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Explanation:
    """Say which kernels compute ``layer(x, mask)``, why, and which elements share statistics.

    Args:
        layer: One of normkit's layers.
        x: An input for it, ``(N, C, *S)``.
        mask: Which positions are valid, in a form that the layer takes.

    Returns:
        The explanation, which can be printed.

    Raises:
        InputTypeError: If the layer is not one of normkit's.
        InputError: If the input does not fit the layer.

    Example:
        >>> import torch
        >>> from normkit import GroupNorm
        >>> explain(GroupNorm(6, num_groups=3), torch.randn(4, 6, 5, 7)).groups
        'statistics over a group of 1 of 4 examples, 2 of 6 channels, 35 of 35 positions'
    """
    found = parts(layer)
    require_feature_map(x, cast(NormLayer, layer).num_features, type(layer).__name__)
    kernels, reason = _kernels(cast(NormLayer, layer), x, mask)
    return Explanation(
        layer=type(layer).__name__,
        kernels=kernels,
        reason=reason,
        groups="; ".join(part.describe(x.shape) for part in found),
        parts=found,
    )


def _kernels(layer: NormLayer, x: Tensor, mask: Tensor | None) -> tuple[Kernels, str]:
    """Return the kernels of the call, or of its first part, and the reasons for all parts."""
    found = [decide(x, call, is_computed=False) for call in layer.routes(x, mask is not None)]
    reasons = list(dict.fromkeys(_in_full(decision) for decision in found))
    reason, apart = "; then: ".join(reasons), layer.why_separate()
    if apart is not None:
        reason = f"{reason}, each norm by itself, because {apart}"
    return found[0].kernels, reason + _of_activation(layer, found)


def _of_activation(layer: NormLayer, found: list[Decision]) -> str:
    """Who applies a layer's activation, where it has one."""
    if layer.activation is None:
        return ""
    can = layer.takes_ending and layer.why_separate() is None
    at_once = can and found[0].way == "operator"
    return f"; {layer.activation} in the same pass" if at_once else f"; then {layer.activation}"


def _in_full(decision: Decision) -> str:
    usual = f"the {NAMES[decision.kernels]} kernels compute this"
    return decision.reason.replace(usual, f"{usual}{details(decision.kernels)}", 1)
