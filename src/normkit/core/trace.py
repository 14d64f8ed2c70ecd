"""Tracing: a composite's formula becomes programs on tables, which kernels run.

The formula is called once with ``Symbol`` objects in place of tensors. Each operation on them adds
a step to the program.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, cast

from torch import Tensor

from normkit.core.algebra import (
    EstimatedStatistics,
    GroupStatistics,
    Rule,
    WeighedStatistics,
    standardize,
)
from normkit.core.composite import Composite
from normkit.core.moments import Moments
from normkit.core.normalize import Affine
from normkit.core.partition import Partition
from normkit.core.symbol import Symbol, UnsupportedStepError
from normkit.core.transforms import known_number, known_size
from normkit.kernels.calls import MOST_PARAMETERS, Programs
from normkit.kernels.program import Program, Steps, finished
from normkit.kernels.shapes import why_no_kernel
from normkit.kernels.transpose import transposed

Source = Literal["own", "estimates", "given", "mixed", "example"]
"""Statistics of a batch stage: the batch's own; estimates that the batch updates first; given ones;
a mixture of the example's own and given ones; the example's own alone."""
Sizes = tuple[int | None, ...]
_MOVES = {"own": "average", "estimates": "estimates"}


def batch_rule(
    source: Source, composite: Composite, num_channels: int, share: float | Tensor = 0.0
) -> Rule:
    """The rule of a batch stage with this number of channels."""
    eps = composite.batch_eps
    whole = Partition(num_groups=num_channels)
    if source == "own":
        return GroupStatistics(partition=whole, eps=eps)
    if source == "estimates":
        return EstimatedStatistics(partition=whole, eps=eps)
    example = Partition(num_groups=num_channels, examples_per_group=1)
    weight = {"given": 0.0, "example": 1.0}.get(source, share)
    return WeighedStatistics(partition=example, eps=eps, example_weight=weight)


class _RecordingRule:
    """A batch stage's rule that records its input and the statistics it normalised by."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.partition, self.eps = rule, rule.partition, rule.eps
        self.input: Moments | None = None
        self.used: Moments | None = None

    def __call__(
        self, table: Moments, weight: Tensor | None, bias: Tensor | None, *given: Tensor
    ) -> Affine:
        return standardize(table, self.groups(table, *given), self.rule, weight, bias)

    def groups(self, table: Moments, *given: Tensor) -> Moments:
        self.input = table
        self.used = self.rule.groups(table, *given)
        return self.used


def programs_in_graph(
    composite: Composite, num_channels: int, sizes: Sizes, source: Source
) -> Programs:
    """Return what ``programs_of`` returns, while ``torch.compile`` traces."""
    formula, options, eps = composite.formula, composite.options, composite.batch_eps
    beside, has_batch = composite.num_beside, composite.has_batch
    # The fields are passed one by one, because torch.compile drops fields of a named tuple that
    # have their default value.
    options = tuple([o if isinstance(o, str) else known_number(o) for o in options])
    numbers = known_number(eps), known_size(beside), known_number(has_batch)
    known = tuple([None if size is None else known_size(size) for size in sizes])
    return _programs(formula, options, *numbers, known_size(num_channels), known, source)


def _programs(*key: Any) -> Programs:
    """Call ``programs_of``; the result is a constant in a compiled graph."""
    return programs_of(Composite(*key[:5]), *key[5:])


# torch.compiler.assume_constant_result sets this attribute too, but importing it is slow.
_programs._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache(maxsize=1024)
def programs_of(composite: Composite, num_channels: int, sizes: Sizes, source: Source) -> Programs:
    """Trace a composite's programs, for parameters of these sizes."""
    if len(sizes) > MOST_PARAMETERS:
        return Programs("", "", 0, f"a program takes at most {MOST_PARAMETERS} parameters")
    try:
        forward = _forward(composite, num_channels, sizes, source)
    except UnsupportedStepError as error:
        return Programs("", "", 0, str(error))
    backward = transposed(forward, len(sizes))
    obstacle = why_no_kernel(forward) or why_no_kernel(backward)
    kept = forward.kept_columns
    return Programs(str(forward), str(backward), kept, why_not_triton=obstacle)


def _forward(composite: Composite, num_channels: int, sizes: Sizes, source: Source) -> Program:
    steps = Steps(num_channels)

    def table(name: str, columns: int = num_channels) -> Tensor:
        return cast("Tensor", Symbol(steps, steps.add(name, columns=columns)))

    def row(name: str, index: int, columns: int) -> Tensor:
        return cast("Tensor", Symbol(steps, steps.add(name, numbers=(index,), columns=columns)))

    size = composite.num_batch_channels(num_channels)
    share = table("share", 1)
    recorded = _RecordingRule(batch_rule(source, composite, size, share))
    given = () if source == "own" or size == 0 else (row("given", 0, size), row("given", 1, size))
    extra = (share,) if source == "estimates" else ()
    parameters = [None if n is None else row("parameter", i, n) for i, n in enumerate(sizes)]
    moments = Moments(table("mean"), table("var"))
    algebra = composite.algebra(cast("Rule", recorded))
    affine = algebra(moments, *parameters, *given, *extra)
    if recorded.input not in (None, moments) and not hasattr(algebra, "batch_input"):
        raise TypeError(
            f"the batch stage of {composite.formula.__name__} normalises another input than the "
            f"map, which running statistics must track on all paths: return an object with "
            f"__call__ and batch_input(table), such as normkit.core.composite.GroupAndBatch"
        )
    results = {"scale": affine.scale, "center": affine.center}
    if size > 0:
        kept = recorded.used if source in _MOVES else Moments(*given)
        if kept is None:
            raise UnsupportedStepError("the formula does not call the batch stage's rule")
        results |= {"kept_mean": kept.mean, "kept_var": kept.var}
    is_alone = source == "given" and composite.num_beside > 0
    return finished(
        steps,
        {name: cast("Symbol", symbol).line for name, symbol in results.items()},
        moves=_MOVES.get(source, "nothing"),
        given_from=composite.num_beside if is_alone else num_channels,
        kept_columns=size,
    )
