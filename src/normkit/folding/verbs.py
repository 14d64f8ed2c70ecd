"""Folding the norms of a trained model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normkit.convert.report import Left, called_as_functions
from normkit.convert.selection import NamedNorms, find_lookalikes, find_norms
from normkit.convert.target import describe
from normkit.errors import ConversionError
from normkit.folding.labels import follow_channels
from normkit.folding.layers import Layer
from normkit.folding.neighbours import Neighbours
from normkit.folding.plan import Plan, Step, plan
from normkit.folding.report import Folded, Folding
from normkit.folding.seen import difference, run, tolerance
from normkit.passes import changes_nothing, require_unwrapped
from normkit.tracing import is_producer, trace
from normkit.weights import bake_weights_

NO_KNOWN_NORM = "it is named like a norm, but none that is known"


@changes_nothing
@torch.inference_mode(False)  # the copy is to run outside of inference mode too
def fold(model: nn.Module, example_input: Any) -> Folding:  # noqa: ANN401
    r"""Multiply the norms of a copy of a trained model into its convolutions and linear layers.

    A norm that evaluates by running statistics is one scale and shift a channel,

    .. math::  y_c = s_c x_c + t_c, \quad s = \gamma / \sqrt{\sigma^2 + \epsilon}, \quad
               t = \beta - s \mu

    and disappears in the layer before it, :math:`W' = s W, b' = s b + t`, or else in all layers
    behind it, :math:`W' = W s, b' = b + W t`. Its activation, and the channel stage of a
    ``BatchChannelNorm``, stay in its place; all names of other layers stay. Whatever is not exact
    is left as it is, with the reason. Reparametrised weights are baked first.

    Args:
        model: Any model with norms of torch, torchvision, timm, detectron or normkit; left as it
            is.
        example_input: What the model is called with: a tuple of arguments, a dict of named ones,
            or the only one. The folded model takes other sizes just as well.

    Returns:
        The folded copy in evaluation mode, as ``.model``, and what was done; prints as a table.

    Raises:
        ConversionError: If a lazy layer is empty, torch cannot copy the model, or the folded model
            does something else.
        OptionError: If the model is wrapped or compiled.
        WeightError: If a weight is parametrised by something else as well.
        TraceError: If the model cannot be traced.

    Numerics:
        Products are taken in float64 and rounded once, to the dtype of the layer's weight.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> done = fold(model, torch.randn(2, 3, 8, 8))
        >>> done.model[1], [(row.name, row.into) for row in done.folded]
        (Identity(), [('1', ('0',))])
    """
    require_unwrapped(model, "fold")
    _require_known_sizes(model)
    new = _evaluating(_copied(model))
    norms = find_norms(new)
    before = run(new, example_input, [m for m in new.modules() if m in norms or is_producer(m)])
    baked = bake_weights_(new).changed
    neighbours = Neighbours(trace(new, example_input), dict(new.named_modules()))
    follow = partial(follow_channels, new, example_input=example_input)
    planned = plan(neighbours, before.calls, norms, follow)
    folded = tuple(_folded(step) for step in planned.steps)
    left = (*_left(norms, planned), *_lookalikes(new), *called_as_functions(neighbours.graph))
    for name, weights in planned.weights.items():
        weights.write_(cast(Layer, new.get_submodule(name)))
    new = _replaced(new, {step.norm: step.rest for step in planned.steps})
    return Folding(
        model=new,
        folded=folded,
        left=left,
        baked=baked,
        difference=_difference(before.output, new, example_input),
    )


def _require_known_sizes(model: nn.Module) -> None:
    empty = [name for name, module in model.named_modules() if _is_empty(module)]
    if empty:
        raise ConversionError(
            f"layers {', '.join(map(repr, empty))} do not know their sizes yet; send one batch "
            f"through the model first"
        )


def _is_empty(module: nn.Module) -> bool:
    values = (*module._parameters.values(), *module._buffers.values())
    return any(is_lazy(value) for value in values if value is not None)


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model.

    Raises:
        ConversionError: If torch cannot.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise ConversionError(
            f"the model cannot be copied ({error}); if a hook computes weights, as of pruning or "
            f"torch.nn.utils.weight_norm, remove it, or send a batch through the model under "
            f"torch.no_grad() first"
        ) from error


def _evaluating(model: nn.Module) -> nn.Module:
    """Set the mode of all modules without ``train()``, which some models override."""
    for module in model.modules():
        module.training = False
    return model


def _folded(step: Step) -> Folded:
    stays = [type(m).__name__ for m in step.rest.children()]
    return Folded(
        name=step.name,
        old=describe(step.norm),
        into=step.into,
        stays=" -> ".join(stays) or "-",
    )


def _left(norms: NamedNorms, planned: Plan) -> Iterator[Left]:
    for norm, names in norms.items():
        if norm in planned.why:
            yield Left(name=names[0], old=describe(norm), why=planned.why[norm])


def _lookalikes(model: nn.Module) -> Iterator[Left]:
    for name, module in find_lookalikes(model).items():
        yield Left(name=name, old=describe(module), why=NO_KNOWN_NORM)


def _replaced(model: nn.Module, rest: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put what is left of norms into their places, under all of their names."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and child in rest:
                module._modules[key] = rest[child].eval()
    return model


def _difference(before: Any, new: nn.Module, example_input: Any) -> float | None:  # noqa: ANN401
    """Measure what folding changed.

    Raises:
        ConversionError: If it is more than rounding.
    """
    try:
        after = run(new, example_input).output
    except Exception as error:
        raise ConversionError(
            f"the folded model fails on the example input ({type(error).__name__}: {error}); its "
            f"forward uses a norm in another way than by calling it; give that norm a hook, and it "
            f"is left as it is"
        ) from error
    found = difference(before, after)
    limit = tolerance(before)
    if found is not None and not found <= limit:
        raise ConversionError(
            f"the folded model's output differs by {found:.1e} of its largest value on the example "
            f"input, where up to {limit:.1e} is rounding: its forward uses a norm or a weight in "
            f"another way than by calling it; give that norm a hook, and it is left as it is"
        )
    return found
