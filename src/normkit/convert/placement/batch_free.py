"""Norms whose statistics are those of one example."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from normkit.convert.rules import read
from normkit.convert.target import is_over_batch
from normkit.errors import ConversionError, SpecError
from normkit.spec import CHANNELS, LIMIT, METHODS, NormSpec

EXAMPLE_WEIGHT = "example_weight"


def batch_free(norm: str | NormSpec) -> NormSpec:
    """Read a spec; one that looks at other examples is refused.

    Raises:
        SpecError: If it cannot be read, or names such a norm.
    """
    spec = NormSpec.parse(norm)
    if not is_over_batch(METHODS[spec.name]):
        if dict(spec.arguments).get(EXAMPLE_WEIGHT, 1) == 1:
            return spec
        raise SpecError(
            f"norm={str(spec)!r} evaluates by statistics of the batches of the training; the norm "
            f"that is placed must be batch-free: leave {EXAMPLE_WEIGHT}= out"
        )
    known = [name for name, recipe in METHODS.items() if not is_over_batch(recipe)]
    raise SpecError(
        f"norm={str(spec)!r} takes statistics over the batch; the norm that is placed must be "
        f"batch-free: {', '.join(known)}; convert_norm_ puts any norm anywhere"
    )


def with_at_most(spec: NormSpec, norm: nn.Module) -> NormSpec:
    """Let a number of groups be at most the number of channels of the norm to be replaced."""
    recipe, given = METHODS[spec.name], dict(spec.arguments)
    if recipe.argument != "num_groups" or {LIMIT, CHANNELS} & given.keys():
        return spec
    try:
        num_features = read(norm).num_features
    except ConversionError:  # the plan refuses it, by name
        return spec
    groups = given.get("", recipe.options()["num_groups"].default)
    if isinstance(groups, int):
        given[""] = min(groups, num_features)
    return replace(spec, arguments=tuple(sorted(given.items())))
