"""Taking a model's population statistics: all layers in one pass, or each with those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.core.partition import require_variance
from normkit.errors import DataError, InputError
from normkit.inference.population import Population, Sums
from normkit.inference.ranks import together
from normkit.inference.tracked import feature_map, statistics_of
from normkit.layers.base import BUFFERS, SegmentLayer, TrackingLayer
from normkit.layers.batch_channel import EstimatedBatchNorm
from normkit.passes import Data, first_calls, inputs_of, progress, uncompiled, untouched

Layers = Mapping[str, nn.Module]
Values = dict[str, Tensor]
"""A layer's buffers by name."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one or all ranks have seen.

    Args:
        num_batches: How many batches were read.
        sums: Of each layer that got an input, by name.
    """

    num_batches: int = 0
    sums: dict[str, Sums] = field(default_factory=dict)


def measure_at_once(model: nn.Module, layers: Layers, data: Data) -> Measured:
    """Measure all layers in one pass, each normalising by its batches as in training."""

    def work() -> Measured:
        populations = {name: Population(layer) for name, layer in layers.items()}
        with untouched(model, training=False), ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(_watch(name, layer, populations[name]))
                normalise_by_batch(layer)
            num_batches = data.send(model, "measuring statistics")
        return Measured(num_batches, {n: _on_cpu(p.sums) for n, p in populations.items()})

    return _merged(together(work, data.group), layers)


def measure_in_order(model: nn.Module, layers: Layers, data: Data) -> Measured:
    """Measure layer after layer, each behind others that evaluate by what was found for them."""
    sums: dict[str, Sums] = {}
    with untouched(model, training=False), uncompiled():
        num_batches, calls = _calls(model, layers, data)
        for name, num_calls in progress(calls.items(), "measuring statistics", len(calls)):
            layer = layers[name]
            found = _inputs_summed(model, layer, name, num_calls, data)
            if found.num_values:
                sums[name] = found
                layer._buffers.update(values_of(name, layer, found))
    return Measured(num_batches, sums)


def values_of(name: str, layer: nn.Module, sums: Sums) -> Values:
    """Buffers of a layer that has seen this.

    Raises:
        DataError: If that was a single value, or something that is not finite.
    """
    population = Population(layer)
    population.merge(sums)
    found, old = population.buffers, statistics_of(layer)
    mean, var = BUFFERS
    values = {mean: found.mean.to(old[mean]), var: found.var.to(old[var])}
    if not all(value.isfinite().all() for value in values.values()):
        raise DataError(
            f"layer {name!r} has statistics that are not finite in {old[mean].dtype}; "
            f"look for NaN, infinity and huge values in the batches and parameters"
        )
    if sums.num_values == 1 and not isinstance(layer, _InstanceNorm):
        raise DataError(
            f"layer {name!r} got a single value for each of its statistics, which has no variance; "
            f"give more batches"
        )
    counts = {name: b for name, b in old.items() if name not in values}
    return values | {name: torch.full_like(b, sums.num_inputs) for name, b in counts.items()}


def _watch(name: str, layer: nn.Module, population: Population) -> Callable[[], None]:
    """Let a population see the inputs of a layer; return how that ends."""
    num_groups = statistics_of(layer)[BUFFERS[0]].numel()
    by_batch = not isinstance(layer, EstimatedBatchNorm)

    def see(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = _checked(name, layer, args[0] if args else next(iter(named.values())))
        if by_batch and x.numel() == num_groups:
            raise InputError(
                f"layer {name!r} got an input of shape {tuple(x.shape)}: one value for each of "
                f"its statistics, which has no variance to normalise by; leave such batches out "
                f"(DataLoader(drop_last=True)), or pass sequential=True, which takes them"
            )
        if isinstance(layer, SegmentLayer):
            require_variance(layer.partition, x.shape, f"layer {name!r}")
        population.add(x)

    return layer.register_forward_pre_hook(see, with_kwargs=True).remove


def normalise_by_batch(layer: nn.Module) -> None:
    """Let a layer of a model at evaluation do what it does in training.

    Estimates of micro batches stay: they normalise in training too. Buffers are hidden where that
    is enough, and are copies elsewhere, so that none moves; that also keeps ranks from waiting for
    each other in a layer, where they may have different numbers of batches.
    """
    if isinstance(layer, EstimatedBatchNorm):
        return
    hides = isinstance(layer, nn.SyncBatchNorm | TrackingLayer)
    for name, buffer in statistics_of(layer).items():
        layer._buffers[name] = None if hides else buffer.clone()
    layer.training = not hides  # without statistics these normalise by their input in any mode


def _checked(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    x = feature_map(layer, x)
    if isinstance(layer, _InstanceNorm) and x.shape[2:].numel() == 1:
        raise InputError(
            f"layer {name!r} got an input of shape {tuple(x.shape)}: a channel of an example is a "
            f"single value, which has no variance; leave the layer out with where="
        )
    return x


def _calls(model: nn.Module, layers: Layers, data: Data) -> tuple[int, dict[str, int]]:
    """Count the batches of all ranks, and how often this rank's forwards call each layer.

    Layers come in the order of their first calls; 0 is for a number that varies.
    """
    names = {layer: name for name, layer in layers.items()}

    def work() -> tuple[int, dict[str, int]]:
        num_batches, found = 0, dict[str, int]()
        for batch in progress(data.read(), "counting batches", data.total()):
            num_batches += 1
            for layer, number in first_calls(model, names, batch, data.forward).items():
                same = found.setdefault(names[layer], number) == number
                found[names[layer]] = number if same else 0
        return num_batches, found

    results = together(work, data.group)
    _, own = results[0 if len(results) == 1 else distributed.get_rank(data.group)]
    order = dict.fromkeys(name for _, found in results for name in found)
    return sum(number for number, _ in results), {name: own.get(name, 0) for name in order}


def _inputs_summed(
    model: nn.Module, layer: nn.Module, name: str, num_calls: int, data: Data
) -> Sums:
    def work() -> Sums:
        population = Population(layer)
        for x in inputs_of(model, layer, data.read(), num_calls, data.forward):
            population.add(_checked(name, layer, x))
        return _on_cpu(population.sums)

    return _sum(layer, together(work, data.group))


def _merged(results: list[Measured], layers: Layers) -> Measured:
    sums = {n: _sum(layer, [r.sums[n] for r in results]) for n, layer in layers.items()}
    return Measured(
        sum(result.num_batches for result in results),
        {name: found for name, found in sums.items() if found.num_values},
    )


def _sum(layer: nn.Module, parts: Iterable[Sums]) -> Sums:
    population = Population(layer)
    for part in parts:
        population.merge(part)
    return population.sums


def _on_cpu(sums: Sums) -> Sums:
    return sums._replace(mean=sums.mean.cpu(), squares=sums.squares.cpu())
