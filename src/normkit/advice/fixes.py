"""The fixes of findings: calls that run as they are, and keep learned values where they can."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from normkit.advice.situation import CheckedNorm, Situation
from normkit.convert.rules import read
from normkit.errors import ConversionError
from normkit.layers.base import BUFFERS

COUNT = "num_batches_tracked"
RECALIBRATE = "nk.recalibrate(model, batches).apply()"
CHANGES = "and further training: it changes what the trained network computes"


def conversion_call(name: str, spec: str, *options: str) -> str:
    """The call that converts the norm of this name to a spec; all norms if the name is empty."""
    wanted = f'{{"{name}": "{spec}"}}' if name else f'"{spec}"'
    return f"nk.convert_norm_({', '.join(('model', wanted, *options))})"


def conversion_fix(
    situation: Situation, norm: CheckedNorm, spec: str, *, everywhere: bool = False
) -> str:
    """Say how to convert a norm to one that computes something else, and what that costs.

    Args:
        situation: The model.
        norm: The norm.
        spec: Spec of the new norm.
        everywhere: Convert all norms of the model, if conversion accepts all of them.
    """
    refused = situation.refusals(spec)
    if norm.module in refused:
        kind, why = type(norm.module).__name__, refused[norm.module]
        return f"another norm in its place, put there by hand: conversion refuses {kind} ({why})"
    loses = situation.trained and all(each.refusal is None for each in situation.norms)
    options = ("calibrate=batches",) if loses else ()
    found = conversion_call("" if everywhere and not refused else norm.name, spec, *options)
    return f"{found} {CHANGES}" if loses else found


def equivalent_call(situation: Situation, norm: CheckedNorm, options: str = "") -> str | None:
    """The call that converts a norm to normkit's norm that computes the same.

    Args:
        situation: The model.
        norm: The norm.
        options: Appended to the spec, for instance ``":eps=1e-05"``.

    Returns:
        The call; None if normkit has no such norm, or conversion refuses it.
    """
    try:
        spec = read(norm.module).equivalent_spec
    except ConversionError:
        return None
    if not spec or norm.module in situation.refusals(spec + options):
        return None
    return conversion_call(norm.name, spec + options)


def trackers(norm: CheckedNorm) -> Iterator[tuple[str, nn.Module]]:
    """The layers with running statistics, the norm itself or its parts, with their names."""
    for name, module in norm.module.named_modules(prefix=norm.name):
        if isinstance(module._buffers.get(BUFFERS[0]), Tensor) and COUNT in module._buffers:
            yield name, module


def freeze_call(*names: str) -> str:
    """The call that freezes the statistics of these layers; of all layers if none is named."""
    if not names:
        return "nk.freeze_statistics(model)"
    listed = ", ".join(f'"{name}"' for name in names)
    condition = f"name == {listed}" if len(names) == 1 else f"name in {{{listed}}}"
    return f"nk.freeze_statistics(model, lambda layer, name: {condition})"
