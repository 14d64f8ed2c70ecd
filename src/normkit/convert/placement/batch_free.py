"""Specs of batch-free norms, whose statistics never depend on other examples."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from normkit.convert.rules import read
from normkit.convert.target import is_over_batch
from normkit.errors import ConversionError, SpecError
from normkit.spec import CHANNELS, LIMIT, METHODS, NormSpec

EXAMPLE_WEIGHT = "example_weight"


def batch_free(norm: str | NormSpec) -> NormSpec:
    """Read the spec of a batch-free norm.

    Raises:
        SpecError: If the spec cannot be read, or its norm is not batch-free.
    """
    spec = NormSpec.parse(norm)
    if not is_over_batch(METHODS[spec.name]):
        if dict(spec.arguments).get(EXAMPLE_WEIGHT, 1) == 1:
            return spec
        raise SpecError(
            f"norm={str(spec)!r} evaluates with running statistics of the training batches; the "
            f"norm that is placed must be batch-free: leave {EXAMPLE_WEIGHT}= out"
        )
    known = [name for name, recipe in METHODS.items() if not is_over_batch(recipe)]
    raise SpecError(
        f"norm={str(spec)!r} takes statistics over the batch; the norm that is placed must be "
        f"batch-free: {', '.join(known)}; convert_norm_ places any norm anywhere"
    )


def limit_groups(spec: NormSpec, norm: nn.Module) -> NormSpec:
    """Limit a spec's number of groups to the number of channels of the norm to be replaced."""
    recipe, given = METHODS[spec.name], dict(spec.arguments)
    if recipe.argument != "num_groups" or {LIMIT, CHANNELS} & given.keys():
        return spec
    try:
        num_features = read(norm).num_features
    except ConversionError:  # planning the conversion raises it again, with the layer's name
        return spec
    groups = given.get("", recipe.options()["num_groups"].default)
    if isinstance(groups, int):
        given[""] = min(groups, num_features)
    return replace(spec, arguments=tuple(sorted(given.items())))
