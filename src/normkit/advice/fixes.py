"""Ways out that run: calls for a model, its batches and what the model has learned."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from normkit.advice.situation import Norm, Situation
from normkit.convert.rules import read
from normkit.errors import ConversionError
from normkit.layers.base import BUFFERS

COUNT = "num_batches_tracked"
RECALIBRATE = "nk.recalibrate(model, batches).apply()"
CHANGES = "and training on: it changes what the trained network computes"


def call(norm: Norm, spec: str, *options: str) -> str:
    """The call that turns a norm into another."""
    wanted = f'{{"{norm.name}": "{spec}"}}' if norm.name else _in_quotes(spec)
    return f"nk.convert_norm_({', '.join(('model', wanted, *options))})"


def converted(situation: Situation, norm: Norm, spec: str, *, everywhere: bool = False) -> str:
    """Say how a norm becomes one that computes something else, and what that costs.

    Args:
        situation: What is known of the model.
        norm: The norm.
        spec: What it is to become.
        everywhere: Whether all norms of the model are meant, if conversion takes all of them.
    """
    refused = situation.refusals(spec)
    if norm.module in refused:
        return refusal(norm, refused[norm.module])
    loses = situation.trained and all(each.refusal is None for each in situation.norms)
    options = ("calibrate=batches",) if loses else ()
    if everywhere and not refused:
        found = f"nk.convert_norm_({', '.join(('model', _in_quotes(spec), *options))})"
    else:
        found = call(norm, spec, *options)
    return f"{found} {CHANGES}" if loses else found


def _in_quotes(text: str) -> str:
    return f'"{text}"'


def same(situation: Situation, norm: Norm, spec: str) -> str | None:
    """The call for a norm that computes the same; None if conversion refuses it."""
    return None if norm.module in situation.refusals(spec) else call(norm, spec)


def refusal(norm: Norm, why: str) -> str:
    """Say that a norm has to be exchanged by hand."""
    kind = type(norm.module).__name__
    return f"another norm in its place, put there by hand: conversion refuses {kind} ({why})"


def twin_of(layer: nn.Module) -> str:
    """Spec of the norm of ours that computes what a layer does; "" if there is none."""
    try:
        return read(layer).equivalent_spec
    except ConversionError:
        return ""


def trackers(norm: Norm) -> Iterator[tuple[str, nn.Module]]:
    """The layer itself, or those inside of it, that keep running statistics, with their names."""
    for name, module in norm.module.named_modules(prefix=norm.name):
        if isinstance(module._buffers.get(BUFFERS[0]), Tensor) and COUNT in module._buffers:
            yield name, module


def frozen(*names: str) -> str:
    """The call that holds the statistics of these layers; of all without names."""
    if not names:
        return "nk.freeze_statistics(model)"
    chosen = f'name == "{names[0]}"' if len(names) == 1 else f"name in {{{_listed(names)}}}"
    return f"nk.freeze_statistics(model, lambda layer, name: {chosen})"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)
