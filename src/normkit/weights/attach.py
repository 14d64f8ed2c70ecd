"""Reparametrising the weights of the convolutions of a model that feed a norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.errors import NormError, TraceError, WeightError
from normkit.passes import all_or_nothing, require_unwrapped
from normkit.tracing.feeds import Feeds, trace_feeds
from normkit.tracing.kinds import CONVOLUTIONS, is_producer
from normkit.weights.algebra import EpsTo
from normkit.weights.cache import WeightCache
from normkit.weights.filters import Filters
from normkit.weights.functional import LENGTH_EPS
from normkit.weights.parametrizations import (
    CenteredWeightNorm,
    Reparametrization,
    WeightNorm,
    WeightStandardization,
)
from normkit.weights.pickling import make_picklable_
from normkit.weights.report import WeightReport

Where = Callable[[nn.Module, str], bool]
Make = Callable[[Tensor, Filters], Reparametrization]


def standardize_weights_(  # noqa: PLR0913 - the variants that published checkpoints differ in
    model: nn.Module,
    where: Where | None = None,
    *,
    preserve: bool = False,
    center: bool = True,
    scale: bool = True,
    eps: float = 1e-5,
    unbiased: bool = False,
    eps_to: EpsTo = "variance",
    gain: bool = False,
    example_input: Any = None,
) -> WeightReport:
    r"""Standardise the weights of the convolutions that feed a norm, in place.

    .. math::  \hat W_o = (W_o - \mu_o) / \sqrt{\sigma_o^2 + \epsilon}

    The ``weight`` of every such layer becomes a ``torch.nn.utils.parametrize`` parametrization. The
    raw weight stays the same parameter object, which an optimizer keeps, under the name
    ``parametrizations.weight.original``. A layer that is standardised already is left unchanged, so
    a second call changes nothing. A layer that one forward calls several times computes its weight
    once in each forward.

    Call this after the weights are initialised or loaded: ``nn.init`` on a computed weight has no
    effect. With ``preserve`` or ``gain``, create the optimizer afterwards, or give it the new
    parameters.

    Args:
        model: Changed in place.
        where: ``where(module, name)`` returns whether to standardise a convolution or linear layer.
            None chooses the convolutions whose output goes into a normalization layer; that must
            be a module, not a function such as ``F.group_norm``.
        preserve: Add a learned gain and offset of each filter, initialised so that the model's
            outputs do not change.
        center: Subtract the filter's mean.
        scale: Divide by the filter's standard deviation.
        eps: Added to the variance, or as ``eps_to`` says; timm's checkpoints have 1e-6.
        unbiased: Use the unbiased variance: divide the sum of squares by ``fan-in - 1``.
        eps_to: ``"variance"``, or ``"std"`` as in the authors' first release.
        gain: Add a learned gain of each filter, initialised to 1.
        example_input: Sent through the model once if ``torch.fx`` cannot trace it: a tuple of
            arguments, a dict of keyword arguments, or a single argument.

    Returns:
        A report of what was changed, and of what was not changed and why.

    Raises:
        WeightError: If a chosen layer has filters of a single value, or its weight is not a plain
            parameter.
        TraceError: If the model cannot be traced and ``where`` is None.
        OptionError: If the model is wrapped for data-parallel training or compiled.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, section 4.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
        >>> print(standardize_weights_(model))
        standardized 1 layer (traced by torch.fx)
          0
        left alone 1 layer
          its output goes into the output, not into a norm: 2
    """
    make = partial(
        WeightStandardization,
        center=center,
        scale=scale,
        eps=eps,
        unbiased=unbiased,
        eps_to=eps_to,
        gain=gain,
        preserve=preserve,
    )
    return attach_(model, make, "standardized", where, example_input)


def weight_norm_(
    model: nn.Module,
    where: Where | None = None,
    *,
    eps: float = LENGTH_EPS,
    example_input: Any = None,
) -> WeightReport:
    r"""Learn a separate length of each filter, in the convolutions that feed a norm, in place.

    .. math::  \hat W_o = g_o W_o / \lVert W_o \rVert

    Args:
        model: Changed in place; its outputs do not change.
        where: As in ``standardize_weights_``.
        eps: Added to the squared length.
        example_input: As in ``standardize_weights_``.

    Returns:
        A report of what was changed, and of what was not changed and why.

    Raises:
        NormError: As ``standardize_weights_`` does.

    Source:
        Salimans & Kingma 2016, arXiv:1602.07868.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> weight_norm_(model).changed
        ('0',)
    """
    return attach_(model, partial(WeightNorm, eps=eps), "weight-normalized", where, example_input)


def centered_weight_norm_(
    model: nn.Module,
    where: Where | None = None,
    *,
    gain: float = 1.414,
    eps: float = LENGTH_EPS,
    example_input: Any = None,
) -> WeightReport:
    r"""Give filters mean 0 and a learned length, in the convolutions that feed a norm, in place.

    .. math::  \hat W_o = g_o (W_o - \mu_o) / \lVert W_o - \mu_o \rVert

    Args:
        model: Changed in place.
        where: As in ``standardize_weights_``.
        gain: Initial length of every filter.
        eps: Added to the squared length.
        example_input: As in ``standardize_weights_``.

    Returns:
        A report of what was changed, and of what was not changed and why.

    Raises:
        NormError: As ``standardize_weights_`` does.

    Source:
        Huang et al. 2017, Centered Weight Normalization in Accelerating Training of Deep Neural
        Networks.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> centered_weight_norm_(model).changed
        ('0',)
    """
    make = partial(CenteredWeightNorm, gain=gain, eps=eps)
    return attach_(model, make, "centred and weight-normalized", where, example_input)


@all_or_nothing
def attach_(
    model: nn.Module,
    make: Make,
    done: str,
    where: Where | None,
    example_input: Any,
) -> WeightReport:
    """Reparametrise the weights of the chosen layers; check everything before changing anything.

    Args:
        model: Changed in place.
        make: Builds the reparametrisation of one weight.
        done: What is done, for the report.
        where: As in ``standardize_weights_``.
        example_input: As in ``standardize_weights_``.
    """
    require_unwrapped(model, "reparametrise")
    layers = {name: module for name, module in model.named_modules() if is_producer(module)}
    feeds = _trace(model, where, example_input)
    why_not = {name: _why_not(name, module, feeds, where) for name, module in layers.items()}
    skipped = {name: reason for name, reason in why_not.items() if reason}
    rules = {name: _build(make, name, m) for name, m in layers.items() if name not in skipped}
    repeated = [rule for name, rule in rules.items() if _may_be_called_again(name, feeds)]
    if repeated:
        cache = WeightCache(model)
        for rule in repeated:
            rule.cache = cache
    for name, rule in rules.items():
        if parametrize.is_parametrized(layers[name]):  # another tensor of it, such as its bias
            give_own_class(layers[name])
        parametrize.register_parametrization(layers[name], "weight", rule)
        make_picklable_(layers[name])
    how = "as where= says" if where else f"traced by {feeds.how}" if feeds else ""
    return WeightReport(done=done, changed=tuple(rules), skipped=skipped, how=how)


def give_own_class(module: nn.Module) -> None:
    """Give a parametrised layer a class that its deep copies do not share.

    ``parametrize`` creates one class for a layer, which deep copies of the layer share, and adds
    properties such as ``weight`` to that class or deletes them. With a class of its own, changing
    this layer does not change the copies.
    """
    shared = type(module)
    own = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    module.__class__ = own  # type: ignore[assignment]


def standardizes_itself(module: nn.Module) -> bool:
    """Whether this is one of timm's convolutions that standardise their own weight."""
    return type(module).__name__.startswith(("StdConv", "ScaledStdConv"))


def rules_of(module: nn.Module) -> list[Reparametrization]:
    """Return normkit's reparametrisations of a module's weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return []
    chain = module.get_submodule("parametrizations").get_submodule("weight").children()
    return [rule for rule in chain if isinstance(rule, Reparametrization)]


def _trace(model: nn.Module, where: Where | None, example_input: Any) -> Feeds | None:
    """Find which layers feed norms; None if the model cannot be traced and ``where`` decides."""
    try:
        return trace_feeds(model, example_input)
    except TraceError as error:
        if where is None:
            raise TraceError(f"{error}; or choose the layers with where=") from error
    return None


def _why_not(name: str, module: nn.Module, feeds: Feeds | None, where: Where | None) -> str | None:
    """Say why a layer is left unchanged, or return None if it is chosen."""
    if where is not None:
        chosen = where(module, name)
        reason = None if chosen else "where= leaves it out"
    else:
        reason = _why_not_normalized(name, module, feeds)
    if reason is None and rules_of(module):
        return "its weight is reparametrised already"
    return reason


def _why_not_normalized(name: str, module: nn.Module, feeds: Feeds | None) -> str | None:
    if not isinstance(module, CONVOLUTIONS):
        return "a linear layer, which only where= includes"
    if standardizes_itself(module):
        return f"{type(module).__name__} standardises its weight itself"
    if feeds is None or name not in feeds.calls:
        return "the forward does not call it"
    if not any(pair.producer == name for pair in feeds.pairs):
        return f"its output goes into {', '.join(feeds.destinations[name])}, not into a norm"
    return None


def _may_be_called_again(name: str, feeds: Feeds | None) -> bool:
    """Whether one forward may call the layer more than once."""
    return feeds is None or feeds.calls.get(name) != 1


@torch.inference_mode(False)  # tensors created in inference mode could not be trained
def _build(make: Make, name: str, module: nn.Module) -> Reparametrization:
    """Build the reparametrisation of one layer; errors name the layer.

    Raises:
        WeightError: If the filters have a single value, or the weight is not a plain parameter.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or isinstance(weight, nn.UninitializedParameter):
        raise WeightError(
            f"the weight of layer {name!r} ({type(module).__name__}) is not a plain parameter: it "
            f"is not initialised yet, or other code computes it; leave the layer out with where=, "
            f"or in convert_norm_ give the norm behind it a spec without +ws"
        )
    try:
        rule = make(weight, Filters.of(module))
    except NormError as error:
        raise type(error)(f"layer {name!r} ({type(module).__name__}): {error}") from error
    return rule.requires_grad_(weight.requires_grad).train(module.training)
