"""Which norm goes into which layer, worked out without touching the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from normkit.convert.selection import Found
from normkit.folding.affine import TORCH_INSTANCE_NORMS, Affine, Evaluated, evaluated
from normkit.folding.labels import Labels, destinations, sources
from normkit.folding.layers import (
    Layer,
    LinearMap,
    channel_axis,
    num_outputs,
    shifts_alike,
    why_fixed,
)
from normkit.folding.neighbours import Neighbours, Way
from normkit.tracing import is_producer

Follow = Callable[[Mapping[nn.Module, int]], Labels]


class Step(NamedTuple):
    """A norm, the layers that take it in, and what stays in its place."""

    norm: nn.Module
    name: str
    into: tuple[str, ...]
    rest: nn.Module


class Plan(NamedTuple):
    """All norms that go, in the order of the forward; new weights; why each other norm stays."""

    steps: tuple[Step, ...]
    weights: Mapping[str, LinearMap]
    why: Mapping[nn.Module, str]


class Place(NamedTuple):
    """The one call of a norm in a forward, and what it does."""

    at: int
    norm: nn.Module
    does: Evaluated

    @property
    def axis(self) -> int:
        """The axis of the channels; from the end where there may be no batch axis."""
        if self.does.channels_last:
            return -1
        kinds = enumerate(TORCH_INSTANCE_NORMS, start=1)
        return next((-1 - n for n, kind in kinds if isinstance(self.norm, kind)), 1)


class Taker(NamedTuple):
    """A layer, and what it takes in."""

    name: str
    layer: Layer
    affine: Affine


def plan(
    neighbours: Neighbours, calls: Mapping[nn.Module, int], norms: Found, follow: Follow
) -> Plan:
    """Find a place for each norm: in the layer before it, else in all layers behind it.

    Args:
        neighbours: The calls of a forward.
        calls: How often norms and layers with weights are called in one.
        norms: The norms of the model.
        follow: Gives the numbers of the channels that come to each layer, for the axes of those in
            each layer's output.
    """
    planner = _Planner(neighbours, calls)
    by_name = {names[0]: norm for norm, names in norms.items()}
    why = {norm: planner.why_not_once(name, norm) for name, norm in by_name.items()}
    places = []
    for at in neighbours.graph.of_kind("norm"):
        norm = by_name[neighbours.graph.calls[at].name]
        adds = "" if len(neighbours.graph.calls[at].inputs) < 2 else "a residual is added in it"
        does = why[norm] or adds or evaluated(norm)
        if isinstance(does, str):
            why[norm] = does
        else:
            places.append(Place(at, norm, does))
    planner.places = {place.at: place for place in places}
    layers = {m: channel_axis(cast(Layer, m)) for m in calls if is_producer(m)}
    planner.labels = follow(layers | {place.norm: place.axis for place in places})
    for place in places:
        why[place.norm] = planner.backward(place)
    for place in reversed([place for place in places if why[place.norm]]):
        said = planner.forward(place)
        why[place.norm] = f"{why[place.norm]}, and {said}" if said else ""
    steps = tuple(planner.steps[at] for at in sorted(planner.steps))
    return Plan(steps, planner.weights, {norm: said for norm, said in why.items() if said})


@dataclass
class _Planner:
    """What is decided so far."""

    neighbours: Neighbours
    calls: Mapping[nn.Module, int]
    places: Mapping[int, Place] = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    weights: dict[str, LinearMap] = field(default_factory=dict)
    steps: dict[int, Step] = field(default_factory=dict)

    def why_not_once(self, name: str, module: nn.Module) -> str:
        """Say why it is not the one call of a module that decides what it does; '' if it is."""
        times = (self.neighbours.num_calls[name], self.calls[module])  # traced, and run
        if not all(times):
            return "the forward does not call it"
        if max(times) > 1:
            return f"one forward calls it {max(times)} times"
        reads = name in self.neighbours.read_directly
        return "the forward reads its parameters directly" if reads else ""

    def backward(self, place: Place) -> str:
        """Fold a norm into the layer whose result it takes; '' if that is done, or why not."""
        source = self.neighbours.source(place.at)
        if isinstance(source, str):
            return source
        taker = self._taker(source, place, behind=False)
        if isinstance(taker, str):
            return taker
        return self._take(place, {taker.name: self._map(taker).followed_by(taker.affine)})

    def forward(self, place: Place) -> str:
        """Fold a norm into all layers that take its result; '' if that is done, or why not."""
        if not place.does.is_all:
            return f"behind it comes its own {type(next(place.does.rest.children())).__name__}"
        targets = self.neighbours.targets(place.at)
        if isinstance(targets, str):
            return targets
        new = {}
        for target in targets:
            taker = self._taker(target, place, behind=True)
            if isinstance(taker, str):
                return taker
            if bool(taker.affine.shift.any()) and not shifts_alike(taker.layer):
                return f"{taker.name!r} pads with zeros, which no weight can shift"
            new[taker.name] = self._map(taker).preceded_by(taker.affine)
        return self._take(place, new)

    def _taker(self, way: Way, place: Place, *, behind: bool) -> Taker | str:
        """Find the layer of a call, and the map as its channels see it, or why it cannot be."""
        name = self.neighbours.graph.calls[way.end].name
        layer = cast(Layer, self.neighbours.modules[name])
        given = None if behind else self.labels.get(layer)
        fixed = why_fixed(layer, None if given is None else given.shape)
        said = self.why_not_once(name, layer) or fixed or self._why_tied(layer)
        if said:
            return f"{name!r} cannot take it: {said}"
        channels = self._behind(way, place, layer) if behind else self._before(way, place, layer)
        if channels is None or not self._has_its_channels(place):
            return f"its channels are not those of {name!r}"
        return Taker(name, layer, place.does.affine.of_channels(channels))

    def _has_its_channels(self, place: Place) -> bool:
        """Whether the norm's input has as many channels as the norm."""
        labels = self.labels.get(place.norm)
        return labels is not None and labels.shape[place.axis] == len(place.does.affine.scale)

    def _before(self, way: Way, place: Place, layer: Layer) -> Tensor | None:
        """In which channel of the norm each channel of the layer's result comes."""
        channels = torch.arange(num_outputs(layer))
        for norm, axis in (*self._norms(way), (place.norm, place.axis)):
            into = destinations(self.labels.get(norm), axis, int(channels.max()) + 1)
            if into is None:
                return None
            channels = into[channels]
        return channels

    def _behind(self, way: Way, place: Place, layer: Layer) -> Tensor | None:
        """From which channel of the norm each channel that the layer takes comes."""
        channels = sources(self.labels.get(layer), channel_axis(layer))
        for norm, axis in reversed(self._norms(way)):
            before = sources(self.labels.get(norm), axis)
            if channels is None or before is None:
                return None
            channels = before[channels]
        return channels

    def _norms(self, way: Way) -> list[tuple[nn.Module, int]]:
        """Norms on the way that are folded already, with the axes of their channels."""
        places = [self.places[at] for at in way.through]
        return [(place.norm, place.axis) for place in places]

    def _why_tied(self, layer: nn.Module) -> str:
        own = [p for p in layer._parameters.values() if p is not None]
        tied = any(self._num_holders[p] > 1 for p in own)
        return "it shares parameters with another layer" if tied else ""

    @cached_property
    def _num_holders(self) -> Counter[object]:
        modules = self.neighbours.modules.values()
        return Counter(p for module in modules for p in module._parameters.values())

    def _map(self, taker: Taker) -> LinearMap:
        return self.weights.get(taker.name) or LinearMap.of(taker.layer)

    def _take(self, place: Place, new: Mapping[str, LinearMap]) -> str:
        """Note new weights, if their layers can hold them."""
        for name, weights in new.items():
            if not weights.fits(cast(Layer, self.neighbours.modules[name])):
                return f"{name!r} cannot hold the product in its dtype"
        self.weights |= new
        name = self.neighbours.graph.calls[place.at].name
        self.steps[place.at] = Step(place.norm, name, tuple(new), place.does.rest)
        if place.does.is_all:
            self.neighbours.passing.add(place.at)
        return ""
