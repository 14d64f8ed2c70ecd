"""What a conversion would do, worked out and checked without touching the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

import normkit.convert.own  # noqa: F401 - registers its rule
from normkit.convert.report import Change, Left
from normkit.convert.rules import read
from normkit.convert.selection import Chosen, Found, find_hidden, find_lookalikes
from normkit.convert.source import Source
from normkit.convert.target import built, describe, take_over
from normkit.errors import ConversionError, NormError, OptionError, PartitionError
from normkit.layers.base import NormLayer
from normkit.layers.instance_batch import InstanceBatchNorm
from normkit.layers.over_batch import BatchGroupNorm
from normkit.layers.over_example import GroupNorm, InstanceNorm
from normkit.spec import METHODS, NormSpec
from normkit.tracing import CONVOLUTIONS, trace_feeds
from normkit.weights.attach import OWN_FORWARD, rules_of


@dataclass(frozen=True, slots=True)
class Step:
    """One exchange of layers."""

    names: list[str]
    old: nn.Module
    new: NormLayer
    change: Change


@dataclass(frozen=True, slots=True)
class Insertion:
    """One norm where there was none.

    Args:
        old: The module at whose place it comes.
        new: What stands there then: the same with the norm.
        layer: The norm.
        beside: The layer whose parameters its own stand beside in an optimizer.
        change: What is reported.
    """

    old: nn.Module
    new: nn.Module
    layer: NormLayer
    beside: nn.Module
    change: Change


@dataclass(frozen=True, slots=True)
class Plan:
    """All exchanges, all norms that are added, and all that stay."""

    steps: tuple[Step, ...]
    left: tuple[Left, ...]
    insertions: tuple[Insertion, ...] = ()


def plan(
    model: nn.Module,
    found: Found,
    chosen: Chosen,
    batch_size: int | None,
    insertions: tuple[Insertion, ...] = (),
) -> Plan:
    """Build every new layer; refuse with everything that is wrong.

    Raises:
        ConversionError: If a layer has no rule, or several things are wrong.
        PartitionError: If the groups do not divide the channels of some layers.
        NormError: Whatever else a layer refuses, of the kind that it is.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    steps, problems = [], {}
    left = [_left(found[m][0], m, why) for m, why in chosen.left.items()]
    for module, spec in chosen.specs.items():
        try:
            step = _step(found[module], module, spec, like, batch_size)
        except NormError as error:
            problems[module] = error
            continue
        if step is None:
            left.append(_left(found[module][0], module, f"it is {spec.norm_alone} already"))
        else:
            steps.append(step)
    if problems:
        raise _refusal(problems, found, chosen.specs)
    lookalikes = find_lookalikes(model).items()
    left += [_left(n, m, "it is named like a norm, but none that is known") for n, m in lookalikes]
    hidden = find_hidden(model).items()
    left += [_left(n, m, "it is in a Python list or dict, not an nn.ModuleList") for n, m in hidden]
    return Plan(tuple(steps), tuple(left), insertions)


def _left(name: str, module: nn.Module, why: str) -> Left:
    return Left(name=name, old=describe(module), why=why)


def _step(
    names: list[str],
    old: nn.Module,
    spec: NormSpec,
    like: Tensor | None,
    batch_size: int | None,
) -> Step | None:
    """Build the new layer for one norm, or None if the old one is that already."""
    source = read(old)
    resolved = spec.norm_alone.resolve(source.num_features, batch_size=batch_size)
    own = next(
        chain(old.parameters(recurse=False), old.buffers(recurse=False), old.buffers()), like
    )
    new, options = built(resolved, source, own)
    if type(old) is type(new) and repr(old) == repr(new):
        return None
    taken = take_over(new, old, source)
    change = Change(
        name=names[0],
        old=describe(old),
        new=str(resolved),
        carried=(*taken.carried, *options),
        lost=taken.lost,
        warnings=(*source.warnings, *_warnings(new, source), *_shared(names)),
    )
    return Step(names, old, new, change)


def _shared(names: list[str]) -> tuple[str, ...]:
    return (f"shared, also named {', '.join(names[1:])}",) if len(names) > 1 else ()


def _warnings(new: NormLayer, source: Source) -> Iterator[str]:
    """Say what the new layer's groups mean for its inputs."""
    size = source.num_features
    if isinstance(new, BatchGroupNorm) and size % new.num_groups:
        yield f"{new.num_groups} groups do not divide {size} channels; the positions must"
    single = isinstance(new, GroupNorm) and new.num_groups == size
    if single:
        yield f"{size} groups of one channel each: this is instance norm"
    if source.without_positions and (single or isinstance(new, InstanceNorm | InstanceBatchNorm)):
        yield "inputs (N, C) have one value a group, which training refuses"


def _refusal(
    problems: Mapping[nn.Module, NormError], found: Found, specs: Mapping[nn.Module, NormSpec]
) -> NormError:
    """Put everything that is wrong into one error, of the common kind if there is one."""
    kinds = {type(error) for error in problems.values()}
    kind = kinds.pop() if len(kinds) == 1 else ConversionError
    names: dict[str, list[str]] = {}
    for module, error in problems.items():
        line = f"to {specs[module].norm_alone}: {error}"
        names.setdefault(line, []).append(found[module][0] or "the model itself")
    count = f"{len(problems)} layer{'s' if len(problems) > 1 else ''}"
    lines = [f"{count} cannot be converted; nothing was changed"]
    lines += [f"  {', '.join(several)} {line}" for line, several in names.items()]
    offers = {_offer(specs[m]) for m, e in problems.items() if isinstance(e, PartitionError)}
    lines += [f"{offer} takes the largest number that divides" for offer in sorted(offers)]
    return kind("\n".join(lines))


def _offer(spec: NormSpec) -> str:
    limit = dict(spec.arguments).get("") or METHODS[spec.name].options()["num_groups"].default
    return f"{spec.name}:max={limit}"


def feeding(
    model: nn.Module,
    found: Found,
    specs: Mapping[nn.Module, NormSpec],
    example_input: Any,  # noqa: ANN401
) -> tuple[str, ...]:
    """Find the convolutions that ``+ws`` means: those that feed a norm with such a spec.

    Raises:
        OptionError: If there is none.
        TraceError: If the model cannot be followed.
    """
    norms = {found[module][0] for module, spec in specs.items() if spec.standardize_weights}
    if not norms:
        return ()
    pairs = trace_feeds(model, example_input).pairs
    producers = dict.fromkeys(pair.producer for pair in pairs if pair.norm in norms)
    layers = {name: model.get_submodule(name) for name in producers}
    chosen = {name: layer for name, layer in layers.items() if _takes_ws(layer)}
    if not chosen:
        raise OptionError(
            "+ws has nothing to standardise: no convolution feeds the norms that it was asked "
            "for; leave +ws out"
        )
    return tuple(name for name, layer in chosen.items() if not rules_of(layer))


def _takes_ws(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and not type(layer).__name__.startswith(OWN_FORWARD)


def staying(model: nn.Module, steps: Iterable[Step]) -> set[nn.Parameter]:
    """Find the parameters that the model has after the exchange."""
    olds = {step.old: step.new for step in steps}
    inside = {part for old in olds for part in old.modules()}
    others = (m for m in model.modules() if m not in inside)
    kept = {p for m in others for p in m.parameters(recurse=False)}
    return kept | {p for new in olds.values() for p in new.parameters()}
