"""From a plan to a changed model and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.convert.calibration import Calibrator
from normkit.convert.optimizer import Exchange, OptimizerEdit, require_optimizer
from normkit.convert.plan import Plan, staying
from normkit.convert.report import Change, Conversion
from normkit.convert.swap import Swap
from normkit.convert.trial import Trial, own_forwards
from normkit.passes import attempt


def carry_out(  # noqa: PLR0913, PLR0917 - what is done, what follows, what is measured
    model: nn.Module,
    planned: Plan,
    standardize: Sequence[str],
    optimizer: Optimizer | None,
    example_input: Any,  # noqa: ANN401
    dry_run: bool,
    calibrator: Calibrator | None = None,
) -> Conversion:
    """Change the model as planned, unless it is a dry run; all or nothing."""
    edit = None if optimizer is None else _edit(model, planned, optimizer)
    parts = (*planned.steps, *planned.insertions)
    replacements = {part.old: part.new for part in parts}
    keep_function = calibrator is not None
    swap = Swap(model, replacements, standardize, example_input, edit, keep_function)
    trial = None if example_input is None or dry_run else Trial(model, planned, example_input)
    result = Conversion(
        model=model if dry_run else swap.new,
        changes=_changes(planned, edit),
        left=(*planned.left, *(trial.left if trial else ())),
        standardized=tuple(standardize),
        unchecked=() if trial or calibrator else own_forwards(model, planned),
        dry_run=dry_run,
        _swap=swap,
    )

    def work() -> Conversion:
        if not dry_run:
            swap.apply()
        if trial is not None:
            result.changes = _warned(result.changes, trial.check(swap.new))
        if calibrator is not None:
            result.calibration = calibrator.run(swap.new)
        return result

    return attempt(work, *swap.changed)


def _warned(changes: Sequence[Change], said: Mapping[str, Sequence[str]]) -> tuple[Change, ...]:
    """Add to each change what a forward has shown of it."""
    return tuple(replace(c, warnings=(*c.warnings, *said.get(c.name, ()))) for c in changes)


def _edit(model: nn.Module, planned: Plan, optimizer: Optimizer) -> OptimizerEdit:
    require_optimizer(optimizer)
    exchanges = [
        Exchange(_named(step.names[0], step.old), _named(step.names[0], step.new))
        for step in planned.steps
    ]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for part in planned.insertions:
        beside = [(name, p) for name, p in part.beside.named_parameters() if p in held]
        exchanges.append(Exchange(beside, _named(part.change.name, part.layer)))
    return OptimizerEdit(optimizer, exchanges, staying(model, planned.steps))


def _named(name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(prefix=name))


def _changes(planned: Plan, edit: OptimizerEdit | None) -> tuple[Change, ...]:
    """Report what is done, and which layers learn parameters where the old ones had none."""
    homeless = edit.homeless if edit else []
    parts = [(step.change, step.names[0], step.new) for step in planned.steps]
    parts += [(part.change, part.change.name, part.layer) for part in planned.insertions]
    found = []
    for change, name, layer in parts:
        new = [n for n, _ in _named(name, layer) if n in homeless]
        said = [f"{', '.join(new)} joined the optimizer's first group"] if new else []
        found.append(replace(change, warnings=(*change.warnings, *said)))
    return tuple(found)
