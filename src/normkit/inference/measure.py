"""Measure a model's population statistics: all layers in one pass, or one layer after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.core.mask import require_valid_values
from normkit.core.partition import require_variance
from normkit.errors import DataError, InputError
from normkit.inference.norm_inputs import Missed, watch_inputs
from normkit.inference.population import Population, Sums
from normkit.inference.ranks import run_on_all_ranks
from normkit.inference.tracked import statistics_of
from normkit.layers.base import BUFFERS, SegmentLayer, is_estimated
from normkit.passes import Data, first_calls, progress, uncompiled, untouched
from normkit.passes.inputs import ForwardUntil, show_inputs

Layers = Mapping[str, nn.Module]
Values = dict[str, Tensor]
"""A layer's buffers by name."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurement of one rank, or of all ranks together.

    Args:
        num_batches: How many batches were read.
        sums: The sums of each layer that got an input, by name.
        missed: Names of layers with an input that was not seen, with the reason.
    """

    num_batches: int = 0
    sums: dict[str, Sums] = field(default_factory=dict)
    missed: Mapping[str, str] = field(default_factory=dict)


def measure_in_one_pass(model: nn.Module, layers: Layers, data: Data) -> Measured:
    """Measure all layers in one pass, in which they normalise by each batch, as in training."""
    names = {layer: name for name, layer in layers.items()}

    def work() -> Measured:
        populations = {name: Population(layer) for name, layer in layers.items()}
        missed: Missed = {}
        with untouched(model, training=False), ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(_by_batch(name, layer, populations[name], missed))
            num_batches = data.send(model, "measuring statistics")
        sums = {name: _on_cpu(population.sums) for name, population in populations.items()}
        return Measured(num_batches, sums, {names[layer]: why for layer, why in missed.items()})

    return _merged(run_on_all_ranks(work, data.group), layers)


def measure_in_order(model: nn.Module, layers: Layers, data: Data) -> Measured:
    """Measure one layer after another; earlier layers already use their new statistics."""
    sums: dict[str, Sums] = {}
    with untouched(model, training=False), uncompiled():
        num_batches, calls, missed = _calls(model, layers, data)
        for name, num_calls in progress(calls.items(), "measuring statistics", len(calls)):
            layer = layers[name]
            found = _inputs_summed(model, layer, name, num_calls, data)
            if found.num_values:
                sums[name] = found
                # Later layers must be measured behind these; ``untouched`` restores the old ones.
                layer._buffers.update(values_of(name, layer, found))
    return Measured(num_batches, sums, missed)


def values_of(name: str, layer: nn.Module, sums: Sums) -> Values:
    """Compute the buffers of a layer from the sums over its inputs.

    Raises:
        DataError: If each statistic has a single value behind it, or is not finite.
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
    counts = {key: b for key, b in old.items() if key not in values}
    return values | {key: torch.full_like(b, sums.num_inputs) for key, b in counts.items()}


def _by_batch(
    name: str, layer: nn.Module, population: Population, missed: Missed
) -> AbstractContextManager[None]:
    """Let a layer normalise by each batch, and add its inputs to a population."""
    num_groups = statistics_of(layer)[BUFFERS[0]].numel()
    uses_batch = not is_estimated(layer)

    def see(x: Tensor, valid: Tensor | None = None) -> None:
        _require_several_positions(name, layer, x)
        num_values = x.numel() if valid is None else int(valid.sum()) * x.shape[1]
        if uses_batch and num_values == num_groups:
            raise InputError(
                f"layer {name!r} got an input of shape {tuple(x.shape)}: one value for each of "
                f"its statistics, which has no variance to normalise by; leave such batches out "
                f"(DataLoader(drop_last=True)), or pass sequential=True, which accepts them"
            )
        if isinstance(layer, SegmentLayer):
            what = f"layer {name!r}"
            if valid is None:
                require_variance(layer.partition, x.shape, what)
            else:
                require_valid_values((layer.partition,), valid, x.shape, what)
        population.add(x, valid)

    return watch_inputs(layer, see, by_batch=True, missed=missed)


def _require_several_positions(name: str, layer: nn.Module, x: Tensor) -> None:
    if isinstance(layer, _InstanceNorm) and x.shape[2:].numel() == 1:
        raise InputError(
            f"layer {name!r} got an input of shape {tuple(x.shape)}: a channel of an example is a "
            f"single value, which has no variance; leave the layer out with where="
        )


def _calls(
    model: nn.Module, layers: Layers, data: Data
) -> tuple[int, dict[str, int], dict[str, str]]:
    """Count the batches of all ranks, and the calls of each layer in a forward of this rank.

    Returns:
        The number of batches; by layer name, in the order of the first calls, the number of calls
        in each forward, or 0 if that varies; the layers with an unseen input, with the reason.
    """
    names = {layer: name for name, layer in layers.items()}

    def work() -> tuple[int, dict[str, int], dict[str, str]]:
        num_batches, found, missed = 0, dict[str, int](), Missed()
        watch = partial(watch_inputs, missed=missed)
        for batch in progress(data.read(), "counting batches", data.total()):
            num_batches += 1
            for layer, number in first_calls(model, names, batch, data.forward, watch).items():
                same = found.setdefault(names[layer], number) == number
                found[names[layer]] = number if same else 0
        return num_batches, found, {names[layer]: why for layer, why in missed.items()}

    results = run_on_all_ranks(work, data.group)
    # All ranks measure the layers in the same order, because each layer's sums are exchanged. How
    # often a layer is called may differ from rank to rank.
    _, own, _ = results[0 if len(results) == 1 else distributed.get_rank(data.group)]
    missed = _join(each for _, _, each in results)
    order = dict.fromkeys(name for _, found, _ in results for name in found if name not in missed)
    num_batches = sum(number for number, _, _ in results)
    return num_batches, {name: own.get(name, 0) for name in order}, missed


def _join(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: why for part in parts for name, why in part.items()}


def _inputs_summed(
    model: nn.Module, layer: nn.Module, name: str, num_calls: int, data: Data
) -> Sums:
    until = ForwardUntil(num_calls, data.forward, watch_inputs)

    def work() -> Sums:
        population = Population(layer)

        def see(x: Tensor, valid: Tensor | None = None) -> None:
            _require_several_positions(name, layer, x)
            population.add(x, valid)

        show_inputs(model, layer, data.read(), see, until)
        return _on_cpu(population.sums)

    return _sum(layer, run_on_all_ranks(work, data.group))


def _merged(results: list[Measured], layers: Layers) -> Measured:
    missed = _join(result.missed for result in results)
    sums = {n: _sum(layer, [r.sums[n] for r in results]) for n, layer in layers.items()}
    return Measured(
        sum(result.num_batches for result in results),
        {n: found for n, found in sums.items() if found.num_values and n not in missed},
        missed,
    )


def _sum(layer: nn.Module, parts: Iterable[Sums]) -> Sums:
    population = Population(layer)
    for part in parts:
        population.merge(part)
    return population.sums


def _on_cpu(sums: Sums) -> Sums:
    return sums._replace(mean=sums.mean.cpu(), squares=sums.squares.cpu())
