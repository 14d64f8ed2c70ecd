"""Find problems with the norms of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from normkit.advice import group_checks, neighbour_checks, state_checks
from normkit.advice.finding import SEVERITIES, Finding, Findings
from normkit.advice.registry import CHECKS
from normkit.advice.situation import examine, example_of
from normkit.core.check import require_count
from normkit.errors import OptionError
from normkit.passes import changes_nothing, require_inspectable

CHECKED_IN = (group_checks, state_checks, neighbour_checks)
"""The modules with the checks, which are registered when these modules are imported."""


@changes_nothing
def validate(
    model: nn.Module,
    *,
    batch_size: int,
    input_shape: Sequence[int] | None = None,
    training: bool = True,
    pretrained: bool | None = None,
    example_input: Any = None,
) -> Findings:
    """Find problems with the norms of a model at a batch size.

    One example goes through the model in evaluation mode. The model is left as it was: modes,
    buffers, hooks, gradients and random states. The number of values that share statistics at the
    batch size is computed from the shapes of the norms' inputs.

    Args:
        model: A model with norms of torch, torchvision, timm, detectron or normkit.
        batch_size: Examples of a batch in one process.
        input_shape: Shape of one example without the batch axis, such as ``(3, 224, 224)``.
        training: Look for problems in training, too; otherwise only at evaluation. A norm in
            evaluation mode inside a model in training mode counts as frozen.
        pretrained: Whether the model has learned values. Fixes then keep the function that it
            computes, or say that they cannot. None tells it from the norms: the model is trained
            if statistics, scales or shifts differ from those of new layers.
        example_input: Replaces ``input_shape`` by the model's arguments: a tuple of arguments, a
            dict of named arguments, or the only argument. The first axis of the first argument
            counts the examples.

    Returns:
        A list of ``Finding``, the worst first, then in the model's order. It can be printed. Calls
        in a ``fix`` run as they are, with ``model``, and ``batches`` of the training data.

    Raises:
        InputError: If the model raises on the input, or has lazy layers without a shape.
        OptionError: If the batch size or a size in the shape is no positive integer, both or
            neither of ``input_shape`` and ``example_input`` are given, or the model is compiled.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16))
        >>> print(validate(model, batch_size=1, input_shape=(8,))[0])
        error: single values
          1: a group has 1 value for input (1, 16): 1 of 1 examples, 1 of 16 channels, 1 of 1 \
positions
          why: one value has no variance; the layer refuses such batches in training
          fix: a larger batch, or nk.convert_norm_(model, {"1": "ln"})
    """
    batch_size = require_count("batch_size", batch_size)
    _require_plain(model)
    example = _example(model, input_shape, example_input)
    situation = examine(model, batch_size, training, pretrained, example)
    found = [
        replace(each, check=name) for name, check in CHECKS.items() for each in check(situation)
    ]
    return Findings(_sorted(found, model))


def _sorted(found: list[Finding], model: nn.Module) -> list[Finding]:
    """Order by severity, then by place in the model."""
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), places.get(f.name, 0)))


def _require_plain(model: nn.Module) -> None:
    kinds = {kind.__name__ for kind in type(model).__mro__}
    for kind in kinds.intersection(("OptimizedModule", "ScriptModule")):
        raise OptionError(
            f"the model is compiled ({kind}), and its layers are not accessible; validate the "
            f"model that it was compiled from"
        )
    require_inspectable(model, "validate", sharded=True)


def _example(model: nn.Module, input_shape: Sequence[int] | None, example_input: Any) -> Any:
    if (input_shape is None) == (example_input is None):
        raise OptionError(
            "pass exactly one of input_shape=, the shape of one example such as (3, 224, 224), and "
            "example_input=, the model's arguments"
        )
    if input_shape is None:
        return example_input
    if isinstance(input_shape, int | str):
        raise OptionError(
            f"input_shape={input_shape!r} was given; pass a sequence of sizes such as (3, 224, 224)"
        )
    return example_of(model, tuple(require_count("input_shape", size) for size in input_shape))
