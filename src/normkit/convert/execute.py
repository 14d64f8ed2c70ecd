"""Executing a conversion plan: changing the model and writing the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.convert.calibration import Calibrator
from normkit.convert.forward_check import ForwardCheck, custom_forwards
from normkit.convert.optimizer import Exchange, OptimizerEdit, require_optimizer
from normkit.convert.plan import ConversionPlan, remaining_parameters
from normkit.convert.recipe import ConversionRecipe
from normkit.convert.report import Change, Conversion
from normkit.convert.selection import Where
from normkit.convert.swap import Swap
from normkit.convert.to_torch import plan_to_torch
from normkit.layers.base import NormLayer
from normkit.passes import attempt


def execute_plan(  # noqa: PLR0913 - one argument for each choice of the user
    model: nn.Module,
    planned: ConversionPlan,
    standardize: Sequence[str],
    optimizer: Optimizer | None,
    example_input: Any,
    dry_run: bool,
    calibrator: Calibrator | None = None,
    preserved: Collection[str] = (),
) -> Conversion:
    """Change the model as planned, unless it is a dry run; if anything fails, undo everything.

    Args:
        model: The model; changed in place.
        planned: The norms to replace and to insert.
        standardize: Names of the convolutions whose weights to standardise.
        optimizer: Edited to hold the new parameters instead of the old ones.
        example_input: Sent through the model before and after, to check the forward.
        dry_run: Whether to only report what would be done.
        calibrator: Calibrates the new norms afterwards.
        preserved: Those convolutions whose filters keep their gains and offsets, as learned
            parameters.
    """
    edit = None if optimizer is None else _edit(model, planned, optimizer)
    parts = (*planned.replacements, *planned.insertions)
    replacements = {part.old: part.new for part in parts}
    keeps_values = calibrator is not None
    swap = Swap(model, replacements, standardize, example_input, edit, preserved, keeps_values)
    is_checked = example_input is not None and not dry_run
    check = ForwardCheck(model, planned, example_input) if is_checked else None
    result = Conversion(
        model=model if dry_run else swap.new,
        changes=_changes(planned, edit),
        left=(*planned.left, *(check.left if check else ())),
        standardized=tuple(standardize),
        unchecked=() if check or calibrator else custom_forwards(model, planned),
        dry_run=dry_run,
        _swap=swap,
        _recipe=_recipe(planned, standardize, preserved),
        _to_torch=to_torch_,
    )

    def work() -> Conversion:
        if not dry_run:
            swap.apply()
        if check is not None:
            result.changes = _with_warnings(result.changes, check.run(swap.new))
        if calibrator is not None:
            result.calibration = calibrator.run(swap.new)
        return result

    return attempt(work, *swap.changed)


def to_torch_(
    model: nn.Module,
    where: Where | None,
    olds: Mapping[nn.Module, nn.Module],
    optimizer: Optimizer | None,
    example_input: Any,
) -> Conversion:
    """Replace normkit's layers by torch's; see ``plan_to_torch`` and ``execute_plan``."""
    planned = plan_to_torch(model, where, olds, example_input)
    return execute_plan(model, planned, (), optimizer, example_input, dry_run=False)


def _recipe(
    planned: ConversionPlan, standardize: Sequence[str], preserved: Collection[str]
) -> ConversionRecipe | None:
    """Write down how a model of the same kind gets this structure; None if no spec says it."""
    if not all(isinstance(each.new, NormLayer) for each in planned.replacements):
        return None
    return ConversionRecipe(
        norms={each.change.name: each.change.new for each in planned.replacements},
        after_sum=tuple(each.block for each in planned.insertions),
        standardized=tuple(standardize),
        preserved=tuple(name for name in standardize if name in preserved),
    )


def _with_warnings(
    changes: Sequence[Change], warnings: Mapping[str, Sequence[str]]
) -> tuple[Change, ...]:
    """Add warnings to the changes of the norms with these names."""
    return tuple(replace(c, warnings=(*c.warnings, *warnings.get(c.name, ()))) for c in changes)


def _edit(model: nn.Module, planned: ConversionPlan, optimizer: Optimizer) -> OptimizerEdit:
    require_optimizer(optimizer)
    exchanges = [
        Exchange(_named(each.change.name, each.old), _named(each.change.name, each.new))
        for each in planned.replacements
    ]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for part in planned.insertions:
        beside = [(name, p) for name, p in part.beside.named_parameters() if p in held]
        exchanges.append(Exchange(beside, _named(part.change.name, part.layer)))
    return OptimizerEdit(optimizer, exchanges, remaining_parameters(model, planned.replacements))


def _named(name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(prefix=name))


def _changes(planned: ConversionPlan, edit: OptimizerEdit | None) -> tuple[Change, ...]:
    """Return the changes, with a warning where parameters had to join the first group."""
    without_group = edit.without_group if edit else []
    parts = [(each.change, each.new) for each in planned.replacements]
    parts += [(each.change, each.layer) for each in planned.insertions]
    found = []
    for change, layer in parts:
        new = [name for name, _ in _named(change.name, layer) if name in without_group]
        warnings = [f"{', '.join(new)} joined the optimizer's first group"] if new else []
        found.append(replace(change, warnings=(*change.warnings, *warnings)))
    return tuple(found)
