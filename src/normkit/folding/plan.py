"""Planning which norm to fold into which layers, without changing the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from normkit.convert.selection import NamedNorms
from normkit.folding.affine import TORCH_INSTANCE_NORMS, EvaluatedNorm, ScaleShift, evaluated_norm
from normkit.folding.labels import Labels, destinations, sources
from normkit.folding.layers import (
    Layer,
    LinearMap,
    channel_axis,
    num_outputs,
    turns_shift_into_bias,
    why_fixed,
)
from normkit.folding.neighbours import Connection, Neighbours
from normkit.tracing import is_producer

LabelChannels = Callable[[Mapping[nn.Module, int]], Labels]
"""``label(axes)`` is ``follow_channels`` for one model and one input."""


class FoldedNorm(NamedTuple):
    """A norm, the names of the layers that absorb it, and the module that stays in its place."""

    norm: nn.Module
    name: str
    into: tuple[str, ...]
    rest: nn.Module


class FoldingPlan(NamedTuple):
    """The norms to fold, in the order of the forward; the new weights; why other norms stay."""

    norms: tuple[FoldedNorm, ...]
    weights: Mapping[str, LinearMap]
    why: Mapping[nn.Module, str]


class NormCall(NamedTuple):
    """The only call of a norm in a forward: its index, and what the norm computes."""

    at: int
    norm: nn.Module
    evaluated: EvaluatedNorm

    @property
    def axis(self) -> int:
        """The axis of the channels.

        It is counted from the end for torch's instance norms, whose input may have no batch axis.
        """
        if self.evaluated.channels_last:
            return -1
        kinds = enumerate(TORCH_INSTANCE_NORMS, start=1)
        return next((-1 - n for n, kind in kinds if isinstance(self.norm, kind)), 1)


class Absorber(NamedTuple):
    """A layer that can absorb a norm, and the scale and shift for its channels."""

    name: str
    layer: Layer
    affine: ScaleShift


def make_plan(
    neighbours: Neighbours, calls: Mapping[nn.Module, int], norms: NamedNorms, label: LabelChannels
) -> FoldingPlan:
    """Plan to fold each norm into the layer before it, or else into all layers behind it.

    Args:
        neighbours: The calls of a forward.
        calls: How often each norm and each layer with weights is called in one forward.
        norms: The norms of the model.
        label: Finds the channel numbers that arrive in each layer's input, given the axis of the
            channels in each layer's output.
    """
    planner = _Planner(neighbours, calls)
    by_name = {names[0]: norm for norm, names in norms.items()}
    why = {norm: planner.why_not_once(name, norm) for name, norm in by_name.items()}
    norm_calls = []
    for at in neighbours.graph.of_kind("norm"):
        norm = by_name[neighbours.graph.calls[at].name]
        evaluated = why[norm] or evaluated_norm(norm)
        if isinstance(evaluated, str):
            why[norm] = evaluated
        else:
            norm_calls.append(NormCall(at, norm, evaluated))
    planner.norm_calls = {call.at: call for call in norm_calls}
    layers = {m: channel_axis(cast(Layer, m)) for m in calls if is_producer(m)}
    planner.labels = label(layers | {call.norm: call.axis for call in norm_calls})
    for call in norm_calls:
        why[call.norm] = planner.fold_into_source(call)
    for call in reversed([call for call in norm_calls if why[call.norm]]):
        reason = planner.fold_into_targets(call)
        why[call.norm] = f"{why[call.norm]}, and {reason}" if reason else ""
    folded = tuple(planner.folded[at] for at in sorted(planner.folded))
    return FoldingPlan(folded, planner.weights, {norm: each for norm, each in why.items() if each})


@dataclass
class _Planner:
    """The norms folded so far, and the weights that result.

    Methods that return a reason return an empty string if there is nothing in the way.
    """

    neighbours: Neighbours
    calls: Mapping[nn.Module, int]
    norm_calls: Mapping[int, NormCall] = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    weights: dict[str, LinearMap] = field(default_factory=dict)
    folded: dict[int, FoldedNorm] = field(default_factory=dict)

    def why_not_once(self, name: str, module: nn.Module) -> str:
        """Say why a module is not used by exactly one call in a forward."""
        # The traced graph and the run with hooks may disagree: torch.fx fixes the control flow.
        times = (self.neighbours.num_calls[name], self.calls[module])
        if not all(times):
            return "the forward does not call it"
        if max(times) > 1:
            return f"one forward calls it {max(times)} times"
        reads = name in self.neighbours.read_directly
        return "the forward reads its parameters directly" if reads else ""

    def fold_into_source(self, call: NormCall) -> str:
        """Fold a norm into the layer before it, or return the reason why that is impossible."""
        source = self.neighbours.source(call.at)
        if isinstance(source, str):
            return source
        absorber = self._absorber(source, call, behind=False)
        if isinstance(absorber, str):
            return absorber
        return self._record(call, {absorber.name: self._map(absorber).followed_by(absorber.affine)})

    def fold_into_targets(self, call: NormCall) -> str:
        """Fold a norm into all layers behind it, or return the reason why that is impossible."""
        if not call.evaluated.leaves_nothing:
            return f"its own {type(next(call.evaluated.rest.children())).__name__} comes after it"
        targets = self.neighbours.targets(call.at)
        if isinstance(targets, str):
            return targets
        new = {}
        for target in targets:
            absorber = self._absorber(target, call, behind=True)
            if isinstance(absorber, str):
                return absorber
            if bool(absorber.affine.shift.any()) and not turns_shift_into_bias(absorber.layer):
                return f"{absorber.name!r} pads with zeros, which the norm's shift does not reach"
            new[absorber.name] = self._map(absorber).preceded_by(absorber.affine)
        return self._record(call, new)

    def _absorber(self, connection: Connection, call: NormCall, *, behind: bool) -> Absorber | str:
        """Return the layer at the end of a connection, or the reason why it cannot absorb a norm.

        Args:
            connection: The connection from the norm to the layer.
            call: The call of the norm.
            behind: Whether the layer comes behind the norm, rather than before it.
        """
        name = self.neighbours.graph.calls[connection.end].name
        layer = cast(Layer, self.neighbours.modules[name])
        labels = None if behind else self.labels.get(layer)
        fixed = why_fixed(layer, None if labels is None else labels.shape)
        reason = self.why_not_once(name, layer) or fixed or self._why_tied(layer)
        if reason:
            return f"{name!r} cannot absorb it: {reason}"
        match_channels = self._channels_behind if behind else self._channels_before
        channels = match_channels(connection, call, layer)
        if channels is None or not self._has_its_channels(call):
            return f"its channels do not match those of {name!r}"
        return Absorber(name, layer, call.evaluated.affine.at(channels))

    def _has_its_channels(self, call: NormCall) -> bool:
        """Whether the norm's input has as many channels as the norm."""
        labels = self.labels.get(call.norm)
        return labels is not None and labels.shape[call.axis] == len(call.evaluated.affine.scale)

    def _channels_before(
        self, connection: Connection, call: NormCall, layer: Layer
    ) -> Tensor | None:
        """For each output channel of a layer before the norm, find the norm's channel."""
        channels = torch.arange(num_outputs(layer))
        for norm, axis in (*self._norms(connection), (call.norm, call.axis)):
            into = destinations(self.labels.get(norm), axis, int(channels.max()) + 1)
            if into is None:
                return None
            channels = into[channels]
        return channels

    def _channels_behind(
        self, connection: Connection, call: NormCall, layer: Layer
    ) -> Tensor | None:
        """For each input channel of a layer behind the norm, find the norm's channel."""
        channels = sources(self.labels.get(layer), channel_axis(layer))
        for norm, axis in reversed(self._norms(connection)):
            before = sources(self.labels.get(norm), axis)
            if channels is None or before is None:
                return None
            channels = before[channels]
        return channels

    def _norms(self, connection: Connection) -> list[tuple[nn.Module, int]]:
        """Return the folded norms on a connection, with the axes of their channels."""
        norm_calls = [self.norm_calls[at] for at in connection.through]
        return [(call.norm, call.axis) for call in norm_calls]

    def _why_tied(self, layer: nn.Module) -> str:
        own = [p for p in layer._parameters.values() if p is not None]
        tied = any(self._num_holders[p] > 1 for p in own)
        return "it shares parameters with another layer" if tied else ""

    @cached_property
    def _num_holders(self) -> Counter[object]:
        modules = self.neighbours.modules.values()
        return Counter(p for module in modules for p in module._parameters.values())

    def _map(self, absorber: Absorber) -> LinearMap:
        """Return the layer's linear map, with the norms that it has absorbed so far."""
        return self.weights.get(absorber.name) or LinearMap.of(absorber.layer)

    def _record(self, call: NormCall, new: Mapping[str, LinearMap]) -> str:
        """Record a folded norm and the new weights, or say which layer's dtype cannot hold them."""
        for name, weights in new.items():
            if not weights.fits(cast(Layer, self.neighbours.modules[name])):
                return f"{name!r} cannot hold the product in its dtype"
        self.weights |= new
        name = self.neighbours.graph.calls[call.at].name
        self.folded[call.at] = FoldedNorm(call.norm, name, tuple(new), call.evaluated.rest)
        if call.evaluated.leaves_nothing:
            self.neighbours.identities.add(call.at)
        return ""
