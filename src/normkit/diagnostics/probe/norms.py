"""The norms whose inputs a probe observes, and the numbers that it computes from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.moments import Moments
from normkit.diagnostics.channel_difference import channels_first, pooling_groups, stat_diff
from normkit.diagnostics.estimation_shift import distances_between, running_moments
from normkit.inference.norm_classes import describe_own_forward, normalizes_its_input
from normkit.inference.population import Population
from normkit.inference.tracked import (
    CUT,
    Where,
    cuts_positions,
    feature_map,
    keeps_statistics,
    tracked,
    valid_positions,
)
from normkit.layers.base import NormLayer
from normkit.passes.inputs import first_argument


class ObservedNorm:
    """The inputs of one norm in one step.

    Args:
        name: Name of the norm.
        layer: The norm.
        host_name: Name of the module whose input the probe observes: the norm itself, or the
            composite that it is a part of. A composite computes its parts together only while no
            hook watches them, so hooks go on the composite.
        host: The module of that name.
    """

    def __init__(self, name: str, layer: nn.Module, host_name: str, host: nn.Module) -> None:
        self.name, self.host_name = name, host_name
        self._layer, self._host = layer, host
        self._groups = pooling_groups(layer)
        unknown = next((m for m in (host, layer) if not normalizes_its_input(m)), None)
        self.why_unknown = "" if unknown is None else describe_own_forward(unknown)
        """Why it is unknown what the norm normalises; empty if it normalises its input."""
        self.reset()

    def reset(self) -> None:
        """Discard everything that was observed."""
        self._running: Moments | None = None
        self._batch, self._channels = Population(self._layer), Population()

    def keep_running_statistics(self) -> None:
        """Copy the running statistics before the step's first forward updates them."""
        if self._running is None and keeps_statistics(self._layer):
            running = running_moments(self._layer)
            self._running = Moments(running.mean.clone(), running.var.clone())

    @torch.no_grad()
    def add(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Add an input that the module has normalised."""
        x = first_argument(args, named)
        if self.why_unknown or not isinstance(x, Tensor) or x.ndim < 2 or x.numel() == 0:
            return
        valid = valid_positions(self._host, feature_map(self._host, x), args, named)
        if valid is not None and cuts_positions(self._layer, x.shape[1]):
            self.why_unknown = CUT
            return
        is_host = self._host is self._layer
        x = channels_first(self._layer, x) if is_host else self._input_in_host(x, valid)
        if x is None:
            return
        if self._running is not None:
            self._batch.add(x, valid)
        if self._groups:
            self._channels.add(x, valid)

    @property
    def shift(self) -> tuple[float, float] | None:
        """Distances of the step's means and standard deviations from the running ones."""
        if self._running is None or not self._batch.count:
            return None
        return distances_between(self._running, self._batch.moments)

    @property
    def stat_diff(self) -> Tensor | None:
        """StatDiff of each group."""
        if not self._channels.count:
            return None
        return stat_diff(self._channels.moments, self._groups)

    @property
    def was_seen(self) -> bool:
        """Whether the norm got an input."""
        return bool(self._batch.count or self._channels.count)

    def _input_in_host(self, x: Tensor, valid: Tensor | None) -> Tensor | None:
        """Compute the input that the composite gives to this norm."""
        host, x = self._host, feature_map(self._host, x)
        return host.input_of(self._layer, x, valid) if isinstance(host, NormLayer) else x


def norms_of(model: nn.Module, where: Where | None) -> list[ObservedNorm]:
    """Find norms with running statistics, and norms that pool channels."""
    modules = dict(model.named_modules())
    known, parts = tracked(model), parts_of_composites(model)
    found = []
    for name, layer in modules.items():
        if not (name in known or pooling_groups(layer)):
            continue
        if where is not None and not where(layer, name):
            continue
        host = name.rpartition(".")[0] if layer in parts else name
        found.append(ObservedNorm(name, layer, host, modules[host]))
    return found


def parts_of_composites(model: nn.Module) -> set[nn.Module]:
    """Find the norms inside composites; a hook on one would change how the composite computes."""
    composites = (module for module in model.modules() if isinstance(module, NormLayer))
    return {part for norm in composites for part in norm.children() if isinstance(part, NormLayer)}
