"""From what was seen in a step to its rows and notes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normkit.diagnostics.inactive_channels import LayerActivity
from normkit.diagnostics.probe.gradients import Gradients, lengths
from normkit.diagnostics.probe.norms import Norm
from normkit.diagnostics.probe.record import NUMBERS, LayerRecord
from normkit.diagnostics.probe.watch import Watch
from normkit.text import module_name
from normkit.tracing.kinds import is_norm

Cells = dict[str, dict[str, Any]]
"""Columns of a row by name, by the row's name."""


def rows_of(
    model: nn.Module, watch: Watch, gradients: Mapping[str, float], moved: Mapping[str, float]
) -> tuple[LayerRecord, ...]:
    """Rows in the order of the modules, each followed by further calls of its ReLU."""
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
        ("gradient_change", moved),
    ):
        for name, value in values.items():
            cells[module_name(name)][column] = value
    order = {module_name(name): number for number, name in enumerate(modules)}
    names = sorted((n for n in cells if cells[n]), key=lambda n: order[n.split(", call ")[0]])
    return tuple(LayerRecord(name=name, **cells[name]) for name in names)


def notes_of(watch: Watch) -> list[str]:
    """Say what was not seen, and why."""
    notes = []
    if not watch.num_forwards:
        notes.append(
            "no training forward of the model was seen in this step: none was run with gradients "
            "in training mode, or torch.compile runs all of it (eager=True runs recorded steps "
            "uncompiled)"
        )
    elif watch.is_blind:
        notes.append(
            "torch.compile runs the model or parts of it, where hooks see nothing, and ReLUs are "
            "not counted; eager=True runs recorded steps uncompiled"
        )
    norms = watch.norms.values()
    unseen = [module_name(n.name) for n in norms if not (n.was_seen or n.why_unknown)]
    if unseen and watch.num_forwards:
        named = ", ".join(unseen[:3]) + (", ..." if len(unseen) > 3 else "")
        notes.append(f"{len(unseen)} of {len(watch.norms)} norms were not seen: {named}")
    notes += [
        f"what {module_name(norm.name)} normalises is not known: {norm.why_unknown}"
        for norm in norms
        if norm.why_unknown
    ]
    if watch.uneven:
        notes.append(
            f"the second axis of the input of {', '.join(watch.uneven)} changes its size, so it "
            f"does not count channels"
        )
    return notes


def notes_on_gradients(length: float | None, before: Gradients | None, step: int) -> list[str]:
    """Say why there is no gradient, or no change of it."""
    if not length:
        found = "no chosen parameter had a gradient" if length is None else "all gradients are zero"
        return [f"{found} when step() was called; call it before optimizer.zero_grad()"]
    if step == 1:
        return ["the first step has no gradient before it"]
    return [] if before else ["no parameter had a gradient in the step before"]


def notes_on_numbers(loss: float | None, rows: tuple[LayerRecord, ...]) -> list[str]:
    """Name what is not finite, which JSON has no way to write."""
    found = [] if loss is None or math.isfinite(loss) else [f"the loss ({loss})"]
    for row in rows:
        values = [getattr(row, column) for column in NUMBERS]
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            found.append(row.name)
    return [f"not finite: {', '.join(found)}"] if found else []


def _of_norm(norm: Norm) -> dict[str, float]:
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
    """Weights, or biases."""
    return {
        f"{name}.{kind}": parameter.detach()
        for name, module in norms.items()
        if (parameter := module._parameters.get(kind)) is not None
    }
