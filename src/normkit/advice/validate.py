"""What is wrong, or good to know, about the norms of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from normkit.advice import on_groups, on_neighbours, on_state
from normkit.advice.finding import SEVERITIES, Finding, Findings
from normkit.advice.registry import CHECKS
from normkit.advice.situation import examine, example_of
from normkit.core.check import require_count
from normkit.errors import OptionError
from normkit.passes import changes_nothing, require_inspectable

CHECKED_IN = (on_groups, on_state, on_neighbours)
"""Where the checks are; importing a file registers those in it."""


@changes_nothing
def validate(
    model: nn.Module,
    *,
    batch_size: int,
    input_shape: Sequence[int] | None = None,
    training: bool = True,
    pretrained: bool | None = None,
    example_input: Any = None,  # noqa: ANN401
) -> Findings:
    """Find what is wrong with the norms of a model at a batch size.

    The model sees one example in evaluation mode, and is left as it was: modes, buffers, hooks,
    gradients and random states. How many values share statistics at the batch size is worked
    out from the shapes that the norms get.

    Args:
        model: A model with norms of torch, torchvision, timm, detectron or normkit.
        batch_size: Examples of a batch that one process computes.
        input_shape: Of one example, without the batch axis, as in ``(3, 224, 224)``.
        training: Ask about training, too; if not, only about evaluation. A norm in evaluation mode
            inside a model in training mode counts as frozen.
        pretrained: Whether the model's values are learned ones: fixes then keep what it computes,
            or say what they cost. None goes by its norms: statistics that have moved, or scales
            and shifts that are not those of new layers.
        example_input: What the model is called with instead: a tuple of arguments, a dict of
            named ones, or the only one. The first axis of the first is its number of examples.

    Returns:
        A list of ``Finding``, the worst first, then in the model's order. It can be printed. Calls
        in a ``fix`` run as they stand, with ``model``, and ``batches`` of the training data.

    Raises:
        InputError: If the model does not take the input, or has lazy layers without a shape.
        OptionError: If the batch size or the shape has no whole numbers of at least 1, there is
            not one of ``input_shape`` and ``example_input``, or the model is compiled.

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
            f"the model is compiled ({kind}) and cannot be looked into; validate the model that "
            f"it was compiled from"
        )
    require_inspectable(model, "validate", sharded=True)


def _example(model: nn.Module, input_shape: Sequence[int] | None, example_input: Any) -> Any:  # noqa: ANN401
    if (input_shape is None) == (example_input is None):
        raise OptionError(
            "pass one of input_shape=, the shape of one example as in (3, 224, 224), and "
            "example_input=, what the model is called with"
        )
    if input_shape is None:
        return example_input
    if isinstance(input_shape, int | str):
        raise OptionError(
            f"input_shape={input_shape!r} was given; it is a sequence of sizes, as in (3, 224, 224)"
        )
    return example_of(model, tuple(require_count("input_shape", size) for size in input_shape))
