"""Make a record's rows and notes from the observations of a step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normkit.diagnostics.inactive_channels import LayerActivity
from normkit.diagnostics.probe.gradients import Gradients, lengths
from normkit.diagnostics.probe.norms import ObservedNorm
from normkit.diagnostics.probe.record import NUMBERS, LayerRecord
from normkit.diagnostics.probe.watch import Watch
from normkit.text import listed, module_name
from normkit.tracing.kinds import is_norm

Cells = dict[str, dict[str, Any]]
"""For each row's name, its values by column."""


def rows_of(
    model: nn.Module, watch: Watch, gradients: Mapping[str, float], changes: Mapping[str, float]
) -> tuple[LayerRecord, ...]:
    """Make the rows in the order of the modules; further calls of a ReLU follow its first.

    Args:
        model: The model that is trained.
        watch: The observations of the step.
        gradients: L2 norm of each layer's gradient, by layer name.
        changes: Distance of each layer's gradient from the step before, by layer name.
    """
    cells: Cells = defaultdict(dict)
    for norm in watch.norms.values():
        cells[module_name(norm.name)] |= _of_norm(norm)
    for activity in watch.activities:
        cells[activity.name] |= _of_activity(activity)
    modules = dict(model.named_modules())
    norms = {name: module for name, module in modules.items() if is_norm(module)}
    for column, values in (
        ("gamma_norm", lengths(_parameters(norms, "weight"))[1]),
        ("beta_norm", lengths(_parameters(norms, "bias"))[1]),
        ("gradient_norm", gradients),
        ("gradient_change", changes),
    ):
        for name, value in values.items():
            cells[module_name(name)][column] = value
    order = {module_name(name): number for number, name in enumerate(modules)}
    names = sorted((n for n in cells if cells[n]), key=lambda n: order[n.split(", call ")[0]])
    return tuple(LayerRecord(name=name, **cells[name]) for name in names)


def notes_of(watch: Watch) -> list[str]:
    """Say which norms and ReLUs were not observed, and why."""
    notes = []
    if not watch.num_forwards:
        notes.append(
            "no training forward of the model was seen in this step: either none ran in training "
            "mode with gradients, or torch.compile runs the whole model (eager=True runs recorded "
            "steps uncompiled)"
        )
    elif watch.is_blind:
        notes.append(
            "torch.compile runs the model or parts of it; hooks see nothing there, and ReLUs are "
            "not counted; eager=True runs recorded steps uncompiled"
        )
    norms = watch.norms.values()
    unseen = [module_name(n.name) for n in norms if not (n.was_seen or n.why_unknown)]
    if unseen and watch.num_forwards:
        notes.append(
            f"{len(unseen)} of {len(watch.norms)} norms were not seen: {listed(unseen, 3)}"
        )
    notes += [
        f"it is unknown what {module_name(norm.name)} normalises: {norm.why_unknown}"
        for norm in norms
        if norm.why_unknown
    ]
    if watch.uneven:
        notes.append(
            f"the second axis of the input of {', '.join(watch.uneven)} changes its size, so it "
            f"is no channel axis"
        )
    return notes


def notes_on_gradients(length: float | None, before: Gradients | None, step: int) -> list[str]:
    """Say why a record has no gradient, or no change of the gradient."""
    if not length:
        state = "no chosen parameter had a gradient" if length is None else "all gradients are zero"
        return [f"{state} when step() was called; call it before optimizer.zero_grad()"]
    if step == 1:
        return ["before the first step there is no gradient to compare with"]
    return [] if before else ["no parameter had a gradient in the step before"]


def notes_on_numbers(loss: float | None, rows: tuple[LayerRecord, ...]) -> list[str]:
    """Name the numbers that are not finite, because JSON shows them as null."""
    found = [] if loss is None or math.isfinite(loss) else [f"the loss ({loss})"]
    for row in rows:
        values = [getattr(row, column) for column in NUMBERS]
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            found.append(row.name)
    return [f"not finite: {', '.join(found)}"] if found else []


def _of_norm(norm: ObservedNorm) -> dict[str, float]:
    cells = {}
    if (shift := norm.shift) is not None:
        cells |= {"shift_mean": shift[0], "shift_std": shift[1]}
    if (found := norm.stat_diff) is not None:
        spread = found.std(correction=0).item()
        cells |= {"stat_diff": found.mean().item(), "stat_diff_std": spread}
    return cells


def _of_activity(activity: LayerActivity) -> dict[str, float]:
    return {
        "num_rectified": activity.num_channels,
        "num_dead": activity.num_eliminated,
        "zero_share": activity.zero_share,
    }


def _parameters(norms: Mapping[str, nn.Module], kind: str) -> dict[str, Tensor]:
    """The norms' weights, or their biases, by parameter name."""
    return {
        f"{name}.{kind}": parameter.detach()
        for name, module in norms.items()
        if (parameter := module._parameters.get(kind)) is not None
    }
