"""Comparing the outputs of a converted model with those of the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Outputs = list[list[Tensor]]
"""For each batch, the tensors in the model's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    r"""How well the outputs ``y`` of a model agree with the outputs ``o`` of the original.

    All values are taken over all batches.

    Args:
        top1: Share of examples (or positions) where the largest value along axis 1 is at the same
            index; None if axis 1 does not exist or has length 1.
        r2: :math:`1 - \sum (y - o)^2 / \sum (o - \bar o)^2`; 1 means equal outputs, 0 means no
            better than predicting the mean.
        relative_error: :math:`\lVert y - o \rVert / \lVert o \rVert`.
    """

    top1: float | None
    r2: float
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The result of calibrating a converted model.

    Args:
        num_batches: Number of batches.
        num_layers: Number of norms whose scale and shift were set.
        skipped: Names of the other norms, each with the reason.
        original: Agreement of the original model with itself in a second run; any difference is
            noise, for instance from dropout.
        plain: Agreement of the converted model before calibration.
        calibrated: Agreement of the converted model after calibration.
    """

    num_batches: int
    num_layers: int
    skipped: tuple[tuple[str, str], ...]
    original: Agreement | None
    plain: Agreement | None
    calibrated: Agreement | None


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output; 16-bit ones are cast to float32."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf.detach().float() for leaf in leaves if leaf.is_floating_point()]


def agreement(outputs: Outputs, original: Outputs) -> Agreement | None:
    """Compare outputs for the same batches; None if there are none, or if their shapes differ.

    Args:
        outputs: Outputs of the model.
        original: Outputs of the original model for the same batches.
    """
    values, expected = _joined(outputs), _joined(original)
    if not expected or [y.shape for y in values] != [o.shape for o in expected]:
        return None
    pairs = list(zip(values, expected, strict=True))
    error = sum(_squares(y - o) for y, o in pairs)
    spread = sum(_squares(o - o.mean()) for _, o in pairs)
    size = sum(_squares(o) for _, o in pairs)
    return Agreement(
        top1=_top1(outputs, original),
        r2=1 - _ratio(error, spread),
        relative_error=_ratio(error, size) ** 0.5,
    )


def _joined(outputs: Outputs) -> list[Tensor]:
    """Concatenate the values of each output tensor over all batches, in float64."""
    if len({len(batch) for batch in outputs}) != 1:
        return []
    return [
        torch.cat([t.double().flatten() for t in several]) for several in zip(*outputs, strict=True)
    ]


def _top1(outputs: Outputs, original: Outputs) -> float | None:
    """Compare the indices of the largest values of the first output tensor."""
    pairs = [(y[0], o[0]) for y, o in zip(outputs, original, strict=True)]
    if any(o.ndim < 2 or o.shape[1] < 2 for _, o in pairs):
        return None
    same = [(y.argmax(1) == o.argmax(1)).flatten() for y, o in pairs]
    joined = torch.cat(same)
    return joined.double().mean().item() if joined.numel() else None


def _squares(values: Tensor) -> float:
    return values.square().sum().item()


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else float("inf")
    return part / whole


def rows(named: Sequence[tuple[str, Agreement | None]]) -> list[tuple[str, str, str, str]]:
    """Return the cells of a table with one row for each agreement."""
    found = [("", "top-1", "R2", "relative error")]
    for name, value in named:
        if value is None:
            found.append((name, "-", "-", "-"))
        else:
            top1 = "-" if value.top1 is None else f"{100 * value.top1:.1f} %"
            found.append((name, top1, f"{value.r2:.4f}", f"{value.relative_error:.4f}"))
    return found
