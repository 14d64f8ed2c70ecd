"""The public function that folds the norms of a trained model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normkit.convert.plan import left_row, unknown_norms
from normkit.convert.report import called_as_functions
from normkit.convert.selection import find_norms
from normkit.convert.target import describe
from normkit.errors import ConversionError
from normkit.folding.labels import follow_channels
from normkit.folding.layers import Layer
from normkit.folding.neighbours import Neighbours
from normkit.folding.outputs import difference, run, tolerance
from normkit.folding.plan import FoldedNorm, make_plan
from normkit.folding.report import Folded, Folding
from normkit.passes import changes_nothing, require_unwrapped
from normkit.tracing import is_producer, trace
from normkit.weights import bake_weights_


@changes_nothing
@torch.inference_mode(False)  # a copy created in inference mode could only run in inference mode
def fold(model: nn.Module, example_input: Any) -> Folding:
    r"""Multiply the norms of a copy of a trained model into its convolutions and linear layers.

    A norm that evaluates with running statistics is one scale and one shift for each channel,

    .. math::  y_c = s_c x_c + t_c, \quad s = \gamma / \sqrt{\sigma^2 + \epsilon}, \quad
               t = \beta - s \mu

    It is folded into the layer before it, :math:`W' = s W, b' = s b + t`, or else into all layers
    behind it, :math:`W' = W s, b' = b + W t`. Its activation, and the channel stage of a
    ``BatchChannelNorm``, stay in its place. The names of all other layers stay the same. A norm
    that cannot be folded exactly is not folded, and the report says why. Reparametrised weights are
    baked first.

    Args:
        model: Any model with norms of torch, torchvision, timm, detectron or normkit; it is not
            changed.
        example_input: The input with which to trace and check the model: a tuple of arguments, a
            dict of keyword arguments, or a single argument. The folded model accepts inputs of
            other sizes too.

    Returns:
        A report with the folded copy, in evaluation mode, as ``.model``; prints as a table.

    Raises:
        ConversionError: If a lazy layer is not initialised, torch cannot copy the model, or the
            outputs of the folded model differ by more than rounding.
        OptionError: If the model is wrapped or compiled.
        WeightError: If a weight has parametrizations besides normkit's.
        TraceError: If the model cannot be traced.

    Numerics:
        Products are computed in float64 and rounded once, to the dtype of the layer's weight.

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
    label = partial(follow_channels, new, example_input=example_input)
    planned = make_plan(neighbours, before.calls, norms, label)
    folded = tuple(map(_report_row, planned.norms))
    stay = {norm: names[0] for norm, names in norms.items() if norm in planned.why}
    left = [left_row(name, norm, planned.why[norm]) for norm, name in stay.items()]
    left += [*unknown_norms(new), *called_as_functions(neighbours.graph)]
    for name, weights in planned.weights.items():
        weights.write_(cast(Layer, new.get_submodule(name)))
    new = _replaced(new, {each.norm: each.rest for each in planned.norms})
    return Folding(
        model=new,
        folded=folded,
        left=tuple(left),
        baked=baked,
        difference=_difference(before.output, new, example_input),
    )


def _require_known_sizes(model: nn.Module) -> None:
    held = (
        (name, value)
        for name, module in model.named_modules()
        for value in chain(module._parameters.values(), module._buffers.values())
    )
    empty = dict.fromkeys(name for name, value in held if value is not None and is_lazy(value))
    if empty:
        raise ConversionError(
            f"layers {', '.join(map(repr, empty))} do not know their sizes yet; send one batch "
            f"through the model first"
        )


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model.

    Raises:
        ConversionError: If torch cannot copy it.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise ConversionError(
            f"the model cannot be copied ({error}); if a hook computes weights, as by pruning or "
            f"torch.nn.utils.weight_norm, remove it, or send a batch through the model under "
            f"torch.no_grad() first"
        ) from error


def _evaluating(model: nn.Module) -> nn.Module:
    """Set evaluation mode without calling ``train()``, because some models override that."""
    for module in model.modules():
        module.training = False
    return model


def _report_row(norm: FoldedNorm) -> Folded:
    stays = " -> ".join(type(module).__name__ for module in norm.rest.children())
    return Folded(name=norm.name, old=describe(norm.norm), into=norm.into, stays=stays or "-")


def _replaced(model: nn.Module, rest: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace each folded norm, under all of its names, by the modules that stay."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and child in rest:
                module._modules[key] = rest[child].eval()
    return model


def _difference(before: Any, new: nn.Module, example_input: Any) -> float | None:
    """Measure how much folding has changed the output.

    Raises:
        ConversionError: If the folded model fails, or the change is larger than rounding.
    """
    try:
        after = run(new, example_input).output
    except Exception as error:
        raise ConversionError(
            f"the folded model fails on the example input ({type(error).__name__}: {error}): its "
            f"forward uses a norm in another way than by calling it; register any forward hook on "
            f"that norm, and it will not be folded"
        ) from error
    found = difference(before, after)
    limit = tolerance(before)
    if found is not None and not found <= limit:
        raise ConversionError(
            f"the folded model's output differs by {found:.1e} of its largest value on the example "
            f"input, where up to {limit:.1e} can be rounding: its forward uses a norm or a weight "
            f"in another way than by calling the layer; register any forward hook on that norm, "
            f"and it will not be folded"
        )
    return found
