"""What a conversion would do, worked out and checked without touching the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import normkit.convert.own  # noqa: F401 - registers its rule
from normkit.convert.reads import Reads, described, find_reads, require_readable
from normkit.convert.report import Change, Left
from normkit.convert.rules import read
from normkit.convert.selection import Chosen, Found, Hidden, find_hidden, find_lookalikes
from normkit.convert.source import Source
from normkit.convert.target import (
    AFFINE,
    LEAST_EPS,
    built,
    describe,
    pools_examples,
    take_over,
)
from normkit.errors import ConversionError, NormError, OptionError, PartitionError
from normkit.layers.base import NormLayer, SegmentLayer
from normkit.spec import LIMIT, METHODS, NormSpec
from normkit.tracing import CONVOLUTIONS, trace_feeds
from normkit.weights.attach import rules_of, standardizes_itself

OUT_OF_SIGHT = "it is in a Python list or dict, not an nn.ModuleList"


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


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a plan needs to know of the model around a norm.

    Args:
        like: A parameter whose device and dtype a norm without any values takes.
        reads: What forwards read of norms.
        parents: The first module that holds each one.
        holders: How many modules hold each parameter.
        hidden: Norms in places that torch does not look into.
        batch_size: Examples per worker.
    """

    like: Tensor | None
    reads: Reads
    parents: Mapping[nn.Module, nn.Module]
    holders: Mapping[nn.Parameter, int]
    hidden: Sequence[Hidden]
    batch_size: int | None

    @classmethod
    def of(cls, model: nn.Module, batch_size: int | None) -> _Surroundings:
        parents: dict[nn.Module, nn.Module] = {}
        for module in model.modules():
            parents |= {child: module for child in module.children() if child not in parents}
        values = (v for m in model.modules() for v in m._parameters.values() if v is not None)
        return cls(
            like=next((p for p in model.parameters() if p.is_floating_point()), None),
            reads=find_reads(model),
            parents=parents,
            holders=Counter(values),
            hidden=find_hidden(model),
            batch_size=batch_size,
        )

    def mode(self, norm: nn.Module, source: Source) -> bool:
        """Whether what replaces a norm trains: the norm's own flag where that means something."""
        decides = norm if source.has_mode else self.parents.get(norm, norm)
        return decides.training


@torch.inference_mode(False)  # new parameters are to learn, wherever this is called
def plan(
    model: nn.Module,
    found: Found,
    chosen: Chosen,
    batch_size: int | None,
    insertions: tuple[Insertion, ...] = (),
    argument: str = "",
) -> Plan:
    """Build every new layer; refuse with everything that is wrong.

    Args:
        model: Left as it is.
        found: Its norms.
        chosen: What each is to become.
        batch_size: Examples per worker.
        insertions: What is added besides.
        argument: What the spec was given as, with ``=``, for errors that name a better one.

    Raises:
        ConversionError: If a layer has no rule, what hangs on one or what a forward reads of it
            cannot be carried, or several things are wrong.
        PartitionError: If the groups do not divide the channels of some layers.
        NormError: Whatever else a layer refuses, of the kind that it is.
    """
    around = _Surroundings.of(model, batch_size)
    results = {m: _tried(found[m], m, spec, around) for m, spec in chosen.specs.items()}
    problems = {m: result for m, result in results.items() if isinstance(result, NormError)}
    if problems:
        raise _refusal(problems, found, chosen.specs, argument)
    steps = [result for result in results.values() if isinstance(result, Step)]
    left = [_left(found[m][0], m, why) for m, why in chosen.left.items()]
    same = [(m, chosen.specs[m].norm_alone) for m, result in results.items() if result is None]
    left += [_left(found[m][0], m, f"it is {spec} already") for m, spec in same]
    lookalikes = find_lookalikes(model).items()
    left += [_left(n, m, "it is named like a norm, but none that is known") for n, m in lookalikes]
    hidden = [each for each in around.hidden if each.norm not in found]
    left += [_left(each.name, each.norm, OUT_OF_SIGHT) for each in hidden]
    return Plan(tuple(steps), tuple(left), insertions)


@torch.inference_mode(False)
def refusals(model: nn.Module, found: Found, spec: NormSpec) -> dict[nn.Module, NormError]:
    """Find the norms of a model that cannot become what a spec says, and why; nothing changes."""
    around = _Surroundings.of(model, None)
    results = {module: _tried(names, module, spec, around) for module, names in found.items()}
    return {module: r for module, r in results.items() if isinstance(r, NormError)}


def _tried(
    names: list[str], old: nn.Module, spec: NormSpec, around: _Surroundings
) -> Step | NormError | None:
    try:
        return _step(names, old, spec, around)
    except NormError as error:
        return error


def _left(name: str, module: nn.Module, why: str) -> Left:
    return Left(name=name, old=describe(module), why=why)


def _step(names: list[str], old: nn.Module, spec: NormSpec, around: _Surroundings) -> Step | None:
    """Build the new layer for one norm, or None if the old one is that already."""
    source = read(old)
    resolved = spec.norm_alone.resolve(source.num_features, batch_size=around.batch_size)
    own = chain(old.parameters(recurse=False), old.buffers(recurse=False), old.buffers())
    made = built(resolved, source, next(own, around.like))
    new = made.layer
    if type(old) is type(new) and repr(old) == repr(new):
        return None
    _require_exchangeable(old, around.hidden)
    reads = around.reads.get(old, {})
    require_readable(old, new, reads)
    taken = take_over(new, old, source, around.mode(old, source))
    said = (*_warnings(new, source), *described(reads), *_untied(new, source, around.holders))
    change = Change(
        name=names[0],
        old=describe(old),
        new=str(resolved),
        carried=(*taken.carried, *made.carried),
        lost=(*taken.lost, *made.lost),
        warnings=(*source.warnings, *said, *_shared(names)),
    )
    return Step(names, old, new, change)


def _require_exchangeable(old: nn.Module, hidden: Iterable[Hidden]) -> None:
    """Refuse a norm that would go on being called where nothing can take its place.

    Raises:
        ConversionError: With the name of the attribute.
    """
    names = [each.name for each in hidden if each.norm is old and each.holder is None]
    if names:
        raise ConversionError(
            f"{names[0]} holds it as well, in a tuple or by a method of it, and would go on using "
            f"the old layer; hold it in an nn.ModuleList or a list, or leave it alone with where="
        )


def _untied(new: nn.Module, source: Source, holders: Mapping[nn.Parameter, int]) -> Iterator[str]:
    """Say which parameters were shared with other layers and no longer are, or have lost hooks."""
    kept = set(new.parameters())
    for name in AFFINE:
        old = getattr(source, name)
        if isinstance(old, nn.Parameter) and old not in kept and holders.get(old, 0):
            if holders[old] > 1:
                yield f"its {name} was shared with another layer and is a copy now"
            if old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None):
                yield f"hooks of its {name} are not those of the copy"


def _shared(names: list[str]) -> tuple[str, ...]:
    return (f"shared, also named {', '.join(names[1:])}",) if len(names) > 1 else ()


def _warnings(new: NormLayer, source: Source) -> Iterator[str]:
    """Say what the new layer's groups, options and parameters mean for the training."""
    size = source.num_features
    groups = new.partition.num_groups if isinstance(new, SegmentLayer) else 1
    if size % groups:
        yield f"{groups} groups do not divide {size} channels; the positions must"
    if new.needs_positions and getattr(new, "num_groups", None) == size:
        yield f"{size} groups of one channel each: this is instance norm"
    if source.without_positions and new.needs_positions:
        yield "inputs (N, C) have one value a group, which training refuses"
    if source.fixed and pools_examples(new):
        yield "its statistics were fixed and now follow the training, unless .eval()"
    if source.still and pools_examples(new) and not new.statistics_slots():
        yield "its running statistics stood still in training; those of the new layer move"
    if new.eps < LEAST_EPS:
        yield f"eps={new.eps}: a group without variance gives NaN in training"
    yield from _of_parameters(new, source)


def _of_parameters(new: NormLayer, source: Source) -> Iterator[str]:
    """Say which parameters are there that were not, and which do not learn."""
    slot = new.affine_slots()[0].layer
    had = source.weight is not None or source.bias is not None
    for name, start in zip(AFFINE, (1, 0), strict=True):
        if had and getattr(source, name) is None and getattr(slot, name) is not None:
            yield f"it had no {name} and gains one, {start} at first"
    fixed = [name for name, parameter in new.named_parameters() if not parameter.requires_grad]
    if fixed:
        yield f"without a gradient, as before (requires_grad=False): {', '.join(fixed)}"


def _refusal(
    problems: Mapping[nn.Module, NormError],
    found: Found,
    specs: Mapping[nn.Module, NormSpec],
    argument: str,
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
    lines += [
        f'{argument}"{offer}" takes the largest number that divides' for offer in sorted(offers)
    ]
    return kind("\n".join(lines))


def _offer(spec: NormSpec) -> str:
    """The spec with a number of groups that fits every layer."""
    given = dict(spec.arguments)
    limit = given.pop("", None) or METHODS[spec.name].options()["num_groups"].default
    return str(replace(spec, arguments=((LIMIT, limit), *sorted(given.items()))))


def feeding(
    model: nn.Module,
    found: Found,
    specs: Mapping[nn.Module, NormSpec],
    example_input: Any,  # noqa: ANN401
) -> tuple[str, ...]:
    """Find the convolutions that ``+ws`` means: those that feed a norm with such a spec.

    Raises:
        OptionError: If there is none.
        TraceError: If the model cannot be traced.
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
    return isinstance(layer, CONVOLUTIONS) and not standardizes_itself(layer)


def staying(model: nn.Module, steps: Iterable[Step]) -> set[nn.Parameter]:
    """Find the parameters that the model has after the exchange."""
    olds = {step.old: step.new for step in steps}
    inside = {part for old in olds for part in old.modules()}
    others = (m for m in model.modules() if m not in inside)
    kept = {p for m in others for p in m.parameters(recurse=False)}
    return kept | {p for new in olds.values() for p in new.parameters()}
