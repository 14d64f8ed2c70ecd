"""Planning a conversion: building and checking all new layers without changing the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import normkit.convert.own_layers  # noqa: F401 - registers its rule
from normkit.convert.forward_reads import Reads, described, find_reads, require_readable
from normkit.convert.report import Change, Left
from normkit.convert.rules import read
from normkit.convert.selection import Chosen, HiddenNorm, NamedNorms, find_hidden, find_lookalikes
from normkit.convert.source import Source
from normkit.convert.target import (
    AFFINE,
    MIN_SAFE_EPS,
    build_layer,
    describe,
    pools_examples,
    transfer_state,
)
from normkit.errors import ConversionError, NormError, OptionError, PartitionError
from normkit.layers.base import NormLayer, SegmentLayer
from normkit.spec import LIMIT, METHODS, NormSpec
from normkit.tracing import CONVOLUTIONS, trace_feeds
from normkit.weights.attach import rules_of, standardizes_itself

NOT_REGISTERED = "it is in a Python list or dict, not an nn.ModuleList"
UNKNOWN_NORM = "its class name contains 'norm', but normkit does not know the class"


@dataclass(frozen=True, slots=True)
class Replacement:
    """A norm, the layer that replaces it, and what is reported."""

    old: nn.Module
    new: nn.Module
    change: Change


@dataclass(frozen=True, slots=True)
class Insertion:
    """A norm to insert where there was none.

    Args:
        old: The module that is replaced to make room for the norm.
        new: The module that replaces it: the same module with the norm.
        layer: The norm.
        beside: An optimizer holds the norm's parameters in the group of this layer's parameters.
        block: Name of the residual block after whose sum the norm comes.
        change: What is reported.
    """

    old: nn.Module
    new: nn.Module
    layer: NormLayer
    beside: nn.Module
    block: str
    change: Change


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """The norms to replace, the norms that stay, and the norms to insert."""

    replacements: tuple[Replacement, ...]
    left: tuple[Left, ...]
    insertions: tuple[Insertion, ...] = ()


@dataclass(frozen=True, slots=True)
class _ModelContext:
    """Facts about the whole model that planning one replacement needs.

    Args:
        like: A parameter of the model. A new norm takes its device and dtype if the old norm has no
            parameters or buffers.
        reads: Attributes of norms that forwards read.
        parents: For each module, the first module that has it as a child.
        holders: For each parameter, the number of modules that hold it.
        hidden: Norms in attributes where torch does not register modules.
        batch_size: Examples per worker.
    """

    like: Tensor | None
    reads: Reads
    parents: Mapping[nn.Module, nn.Module]
    holders: Mapping[nn.Parameter, int]
    hidden: Sequence[HiddenNorm]
    batch_size: int | None

    @classmethod
    def of(cls, model: nn.Module, batch_size: int | None) -> _ModelContext:
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
        """Return the mode of the new layer, as ``training``.

        It is the old norm's mode if the norm behaves differently in training, else its parent's.
        """
        decides = norm if source.has_mode else self.parents.get(norm, norm)
        return decides.training


@torch.inference_mode(False)  # parameters created in inference mode could not be trained
def make_plan(
    model: nn.Module,
    found: NamedNorms,
    chosen: Chosen,
    batch_size: int | None,
    insertions: tuple[Insertion, ...] = (),
    argument: str = "",
) -> ConversionPlan:
    """Build every new layer; if any cannot be built, raise one error that names all problems.

    Args:
        model: The model; it is not changed.
        found: Its norms.
        chosen: Which norms to replace, and by what.
        batch_size: Examples per worker.
        insertions: Norms to insert besides.
        argument: Name of the user's argument for the spec, with ``=``, for error texts.

    Raises:
        ConversionError: If a layer has no rule, something that was added to a layer or that a
            forward reads cannot be transferred, or the problems are of several kinds.
        PartitionError: If the groups do not divide the channels of some layers.
        NormError: If all problems are of another kind, an error of this kind.
    """
    context = _ModelContext.of(model, batch_size)
    results = {m: _tried(found[m], m, spec, context) for m, spec in chosen.specs.items()}
    problems = {m: result for m, result in results.items() if isinstance(result, NormError)}
    if problems:
        raise _combined_error(problems, found, chosen.specs, argument)
    replacements = [result for result in results.values() if isinstance(result, Replacement)]
    left = [left_row(found[m][0], m, why) for m, why in chosen.left.items()]
    same = [(m, chosen.specs[m].norm_alone) for m, result in results.items() if result is None]
    left += [left_row(found[m][0], m, f"it is {spec} already") for m, spec in same]
    left += unknown_norms(model)
    hidden = [each for each in context.hidden if each.norm not in found]
    left += [left_row(each.name, each.norm, NOT_REGISTERED) for each in hidden]
    return ConversionPlan(tuple(replacements), tuple(left), insertions)


@torch.inference_mode(False)
def refusals(model: nn.Module, found: NamedNorms, spec: NormSpec) -> dict[nn.Module, NormError]:
    """Return, for each norm that cannot be replaced by the spec, the error; nothing is changed."""
    context = _ModelContext.of(model, None)
    results = {module: _tried(names, module, spec, context) for module, names in found.items()}
    return {module: r for module, r in results.items() if isinstance(r, NormError)}


def _tried(
    names: list[str], old: nn.Module, spec: NormSpec, context: _ModelContext
) -> Replacement | NormError | None:
    try:
        return _replacement(names, old, spec, context)
    except NormError as error:
        return error


def left_row(name: str, module: nn.Module, why: str) -> Left:
    """Return the report row of a norm that stays."""
    return Left(name=name, old=describe(module), why=why)


def unknown_norms(model: nn.Module) -> list[Left]:
    """Return the report rows of the modules that are named like norms but are not known."""
    return [left_row(name, m, UNKNOWN_NORM) for name, m in find_lookalikes(model).items()]


def _replacement(
    names: list[str], old: nn.Module, spec: NormSpec, context: _ModelContext
) -> Replacement | None:
    """Build the new layer for one norm; None if the old layer is what the spec says already."""
    source = read(old)
    resolved = spec.norm_alone.resolve(source.num_features, batch_size=context.batch_size)
    own = chain(old.parameters(recurse=False), old.buffers(recurse=False), old.buffers())
    made = build_layer(resolved, source, next(own, context.like))
    new = made.layer
    if type(old) is type(new) and repr(old) == repr(new):
        return None
    _require_replaceable(old, context.hidden)
    reads = context.reads.get(old, {})
    require_readable(old, new, reads)
    transfer = transfer_state(new, old, source, context.mode(old, source))
    warnings = [*source.warnings, *_warnings(new, source), *described(reads)]
    warnings += _copied_parameters(new, source, context.holders)
    if len(names) > 1:
        warnings.append(f"shared, also named {', '.join(names[1:])}")
    change = Change(
        name=names[0],
        old=describe(old),
        new=str(resolved),
        carried=(*transfer.carried, *made.carried),
        lost=(*transfer.lost, *made.lost),
        warnings=tuple(warnings),
    )
    return Replacement(old, new, change)


def _require_replaceable(old: nn.Module, hidden: Iterable[HiddenNorm]) -> None:
    """Refuse a norm that an attribute refers to in a way that cannot be changed.

    Raises:
        ConversionError: If there is such an attribute; the error names it.
    """
    names = [each.name for each in hidden if each.norm is old and each.holder is None]
    if names:
        raise ConversionError(
            f"{names[0]} refers to it too, through a tuple, a set or a bound method, and would "
            f"still use the old layer after the conversion; keep it in an nn.ModuleList or a list "
            f"there, or leave it out with where="
        )


def _copied_parameters(
    new: nn.Module, source: Source, holders: Mapping[nn.Parameter, int]
) -> Iterator[str]:
    """Say which parameters became copies that are no longer shared, or that lack the hooks."""
    kept = set(new.parameters())
    for name in AFFINE:
        old = getattr(source, name)
        if isinstance(old, nn.Parameter) and old not in kept and holders.get(old, 0):
            if holders[old] > 1:
                yield f"its {name} was shared with another layer and is a copy now"
            if old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None):
                yield f"its {name} is a copy now, without the hooks of the old one"


def _warnings(new: NormLayer, source: Source) -> Iterator[str]:
    """Say what the new layer's groups, options and parameters mean for training."""
    size = source.num_features
    groups = new.partition.num_groups if isinstance(new, SegmentLayer) else 1
    if size % groups:
        yield f"{groups} groups do not divide {size} channels; the positions must"
    if new.needs_positions and getattr(new, "num_groups", None) == size:
        yield f"{size} groups of one channel each: this is instance norm"
    if source.without_positions and new.needs_positions:
        yield "inputs (N, C) have one value in each group, which the layer refuses in training"
    if source.fixed and pools_examples(new):
        yield "its statistics were fixed; training updates those of the new layer, unless .eval()"
    if source.buffers_are_frozen and pools_examples(new) and not new.statistics_slots():
        yield "training did not update its running statistics, but updates the new layer's"
    if new.eps < MIN_SAFE_EPS:
        yield f"eps={new.eps}: a group without variance gives NaN in training"
    yield from _parameter_warnings(new, source)


def _parameter_warnings(new: NormLayer, source: Source) -> Iterator[str]:
    """Say which parameters are new, and which have no gradient."""
    slot = new.affine_slots()[0].layer
    had = source.weight is not None or source.bias is not None
    for name, start in zip(AFFINE, (1, 0), strict=True):
        if had and getattr(source, name) is None and getattr(slot, name) is not None:
            yield f"it had no {name} and gets one, initialised to {start}"
    fixed = [name for name, parameter in new.named_parameters() if not parameter.requires_grad]
    if fixed:
        yield f"without a gradient, as before (requires_grad=False): {', '.join(fixed)}"


def _combined_error(
    problems: Mapping[nn.Module, NormError],
    found: NamedNorms,
    specs: Mapping[nn.Module, NormSpec],
    argument: str,
) -> NormError:
    """Combine all problems into one error: of their common class, else a ConversionError."""
    kinds = {type(error) for error in problems.values()}
    kind = kinds.pop() if len(kinds) == 1 else ConversionError
    names: dict[str, list[str]] = {}
    for module, error in problems.items():
        line = f"to {specs[module].norm_alone}: {error}"
        names.setdefault(line, []).append(found[module][0] or "the model itself")
    count = f"{len(problems)} layer{'s' if len(problems) > 1 else ''}"
    lines = [f"{count} cannot be converted; nothing was changed"]
    lines += [f"  {', '.join(several)} {line}" for line, several in names.items()]
    fitting = {_fitting(specs[m]) for m, e in problems.items() if isinstance(e, PartitionError)}
    lines += [
        f'{argument}"{spec}" takes the largest number that divides' for spec in sorted(fitting)
    ]
    return kind("\n".join(lines))


def _fitting(spec: NormSpec) -> str:
    """Change a spec so that its number of groups fits every layer."""
    given = dict(spec.arguments)
    limit = given.pop("", None) or METHODS[spec.name].options()["num_groups"].default
    return str(replace(spec, arguments=((LIMIT, limit), *sorted(given.items()))))


def layers_to_standardize(
    model: nn.Module,
    found: NamedNorms,
    specs: Mapping[nn.Module, NormSpec],
    example_input: Any,
) -> tuple[str, ...]:
    """Return the names of the convolutions that feed a norm whose spec ends in ``+ws``.

    Convolutions that normkit has standardised already are left out.

    Raises:
        OptionError: If no convolution feeds such a norm.
        TraceError: If the model cannot be traced.
    """
    norms = {found[module][0] for module, spec in specs.items() if spec.standardize_weights}
    if not norms:
        return ()
    pairs = trace_feeds(model, example_input).pairs
    producers = dict.fromkeys(pair.producer for pair in pairs if pair.norm in norms)
    layers = {name: model.get_submodule(name) for name in producers}
    chosen = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, CONVOLUTIONS) and not standardizes_itself(layer)
    }
    if not chosen:
        raise OptionError(
            "+ws has nothing to standardise: no convolution feeds the norms with +ws; leave +ws out"
        )
    return tuple(name for name, layer in chosen.items() if not rules_of(layer))


def remaining_parameters(
    model: nn.Module, replacements: Iterable[Replacement]
) -> set[nn.Parameter]:
    """Return the parameters that the model has after the replacements."""
    olds = {each.old: each.new for each in replacements}
    inside = {part for old in olds for part in old.modules()}
    others = (m for m in model.modules() if m not in inside)
    kept = {p for m in others for p in m.parameters(recurse=False)}
    return kept | {p for new in olds.values() for p in new.parameters()}
