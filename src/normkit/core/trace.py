"""A composite's formula, followed once, as programs on tables that kernels run.

The formula is called with ``Symbol`` in the place of tensors, which note what is done with them.
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
from normkit.core.symbol import NotFollowedError, Symbol
from normkit.core.transforms import known_number, known_size
from normkit.kernels.calls import Programs
from normkit.kernels.program import Program, Steps, finished
from normkit.kernels.shapes import why_no_kernel
from normkit.kernels.transpose import transposed

Source = Literal["own", "estimates", "given", "mixed", "example"]
"""Where a batch stage's statistics come from: the batch; estimates that it moves first; somebody
gives them; a mixture of the example's own with given ones; the example alone."""
Sizes = tuple[int | None, ...]
MOST_PARAMETERS = 4
_MOVES = {"own": "average", "estimates": "estimates"}


def batch_rule(
    source: Source, composite: Composite, num_channels: int, share: float | Tensor = 0.0
) -> Rule:
    """The rule of a batch stage that sees so many channels."""
    eps = composite.batch_eps
    whole = Partition(num_groups=num_channels)
    if source == "own":
        return GroupStatistics(partition=whole, eps=eps)
    if source == "estimates":
        return EstimatedStatistics(partition=whole, eps=eps)
    example = Partition(num_groups=num_channels, examples_per_group=1)
    weight = {"given": 0.0, "example": 1.0}.get(source, share)
    return WeighedStatistics(partition=example, eps=eps, example_weight=weight)


class _Noted:
    """A batch stage's rule, and what it took for the batch's statistics."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.partition, self.eps = rule, rule.partition, rule.eps
        self.input: Moments | None = None
        self.seen: Moments | None = None

    def __call__(
        self, table: Moments, weight: Tensor | None, bias: Tensor | None, *given: Tensor
    ) -> Affine:
        return standardize(table, self.groups(table, *given), self.rule, weight, bias)

    def groups(self, table: Moments, *given: Tensor) -> Moments:
        self.input = table
        self.seen = self.rule.groups(table, *given)
        return self.seen


def followed_in_graph(
    composite: Composite, num_channels: int, sizes: Sizes, source: Source
) -> Programs:
    """What ``followed`` returns, while ``torch.compile`` traces."""
    formula, options, eps = composite.formula, composite.options, composite.batch_eps
    beside, has_batch = composite.num_beside, composite.has_batch
    # field by field, because torch.compile loses those of a named tuple that have their default
    options = tuple([o if isinstance(o, str) else known_number(o) for o in options])
    numbers = known_number(eps), known_size(beside), known_number(has_batch)
    known = tuple([None if size is None else known_size(size) for size in sizes])
    return _programs(formula, options, *numbers, known_size(num_channels), known, source)


def _programs(*key: Any) -> Programs:
    """A constant of a compiled graph: ``key`` decides all of it."""
    return followed(Composite(*key[:5]), *key[5:])


# What torch.compiler.assume_constant_result does, without importing the compiler.
_programs._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache(maxsize=1024)
def followed(composite: Composite, num_channels: int, sizes: Sizes, source: Source) -> Programs:
    """A composite's programs, for parameters of these sizes."""
    if len(sizes) > MOST_PARAMETERS:
        return Programs("", "", 0, f"a program takes at most {MOST_PARAMETERS} parameters")
    try:
        forward = _forward(composite, num_channels, sizes, source)
    except NotFollowedError as error:
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
    noted = _Noted(batch_rule(source, composite, size, share))
    given = () if source == "own" or size == 0 else (row("given", 0, size), row("given", 1, size))
    extra = (share,) if source == "estimates" else ()
    parameters = [None if n is None else row("parameter", i, n) for i, n in enumerate(sizes)]
    moments = Moments(table("mean"), table("var"))
    algebra = composite.algebra(cast("Rule", noted))
    affine = algebra(moments, *parameters, *given, *extra)
    if noted.input not in (None, moments) and not hasattr(algebra, "batch_input"):
        raise TypeError(
            f"the batch stage of {composite.formula.__name__} sees something else than the map, "
            f"and running statistics must follow that on all paths: return an object with "
            f"__call__ and batch_input(table), as normkit.core.composite.GroupAndBatch is one"
        )
    results = {"scale": affine.scale, "center": affine.center}
    if size > 0:
        kept = noted.seen if source in _MOVES else Moments(*given)
        if kept is None:
            raise NotFollowedError("the formula does not call the batch stage's rule")
        results |= {"kept_mean": kept.mean, "kept_var": kept.var}
    is_alone = source == "given" and composite.num_beside > 0
    return finished(
        steps,
        {name: cast("Symbol", symbol).line for name, symbol in results.items()},
        moves=_MOVES.get(source, "nothing"),
        given_from=composite.num_beside if is_alone else num_channels,
        kept_columns=size,
    )
