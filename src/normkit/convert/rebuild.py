"""Giving a new model the structure that a conversion gave another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.convert.execute import execute_plan
from normkit.convert.placement.after_sum import has_norm_after_sum, norm_after_sum
from normkit.convert.placement.blocks import find_layout
from normkit.convert.plan import Insertion, make_plan
from normkit.convert.recipe import ConversionRecipe
from normkit.convert.report import Conversion
from normkit.convert.selection import Chosen, NamedNorms, find_norms
from normkit.errors import OptionError
from normkit.passes import all_or_nothing, require_unwrapped
from normkit.spec import NormSpec
from normkit.text import listed, module_name
from normkit.tracing.kinds import is_producer
from normkit.weights.attach import rules_of

AS_IT_WAS = "build the model as it was before that conversion"


@all_or_nothing
def apply_recipe(
    model: nn.Module,
    recipe: Mapping[str, Any] | str,
    *,
    optimizer: Optimizer | None = None,
    example_input: Any = None,
) -> Conversion:
    """Convert a model as another one was converted, in place, before its checkpoint is loaded.

    The new layers take over the model's own parameters as in ``convert_norm_``; the checkpoint then
    sets them. A norm that already is what the recipe says is not replaced, so a second call changes
    nothing.

    Args:
        model: Built as the other model was before its conversion.
        recipe: What ``Conversion.recipe()`` returned, or the JSON text of it. A file with several
            conversions has a recipe of each; apply them in their order.
        optimizer: Edited to match the model, as in ``convert_norm_``.
        example_input: As in ``convert_norm_``; also used to find the residual blocks of a recipe
            of ``place_ibn_(model, "b")`` if ``torch.fx`` cannot trace the model.

    Returns:
        A report with the model, as of ``convert_norm_``.

    Raises:
        OptionError: If it is no recipe, the model has no such norms, layers or blocks, or is
            wrapped or compiled.
        NormError: As ``convert_norm_`` does.

    Example:
        >>> make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> from normkit.convert import convert_norm_
        >>> recipe = convert_norm_(make(), "gn:4+ws").recipe()
        >>> recipe
        {'format': 1, 'norms': {'1': 'gn:4'}, 'standardized': ['0']}
        >>> apply_recipe(make(), recipe).model[1].num_groups
        4
    """
    require_unwrapped(model, "convert")
    wanted = ConversionRecipe.read(recipe)
    found = find_norms(model)
    specs = _specs(found, wanted.norms)
    left = {norm: "the recipe does not name it" for norm in found if norm not in specs}
    insertions = _insertions(model, wanted.after_sum, example_input)
    planned = make_plan(model, found, Chosen(specs, left), None, insertions)
    standardize = _layers_to_standardize(model, wanted.standardized)
    preserved = frozenset(wanted.preserved)
    return execute_plan(
        model, planned, standardize, optimizer, example_input, False, preserved=preserved
    )


def _specs(found: NamedNorms, wanted: Mapping[str, str]) -> dict[nn.Module, NormSpec]:
    """Find the norms by their names.

    Raises:
        OptionError: If there are no norms of these names.
        SpecError: If a spec cannot be read.
    """
    by_name = {name: norm for norm, names in found.items() for name in names}
    _require_known("norms", wanted, by_name)
    return {by_name[name]: NormSpec.parse(text) for name, text in wanted.items()}


def _insertions(
    model: nn.Module, wanted: Sequence[str], example_input: Any
) -> tuple[Insertion, ...]:
    """Build the norms after the sums of these blocks, where there are none yet."""
    if not wanted:
        return ()
    layout = find_layout(model, example_input)
    blocks = {block.name: block for block in (*layout.blocks, *layout.others)}
    _require_known("residual blocks", wanted, blocks)
    without = [blocks[name] for name in wanted if not has_norm_after_sum(blocks[name])]
    return tuple(norm_after_sum(block, model) for block in without)


def _layers_to_standardize(model: nn.Module, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the names of those layers whose weights are not standardised yet."""
    layers = {name: module for name, module in model.named_modules() if is_producer(module)}
    _require_known("convolutions", wanted, layers)
    return tuple(name for name in wanted if not rules_of(layers[name]))


def _require_known(what: str, wanted: Iterable[str], known: Mapping[str, object]) -> None:
    unknown = [module_name(name) for name in wanted if name not in known]
    if unknown:
        raise OptionError(
            f"the recipe names {what} that the model does not have: {listed(unknown, at_most=8)}; "
            f"{AS_IT_WAS}"
        )
