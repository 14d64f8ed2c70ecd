"""Weight reparametrisations on the convolutions of a model that feed a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.errors import NormError, TraceError, WeightError
from normkit.passes import all_or_nothing, require_unwrapped
from normkit.tracing.feeds import Feeds, trace_feeds
from normkit.tracing.kinds import CONVOLUTIONS, is_producer
from normkit.weights.algebra import EpsTo
from normkit.weights.filters import Filters
from normkit.weights.functional import LENGTH_EPS
from normkit.weights.once import OncePerForward
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

OWN_FORWARD = ("StdConv", "ScaledStdConv")
"""How the names of timm's convolutions begin that standardise their weight themselves."""


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
    example_input: Any = None,  # noqa: ANN401
) -> WeightReport:
    r"""Standardise the weights of the convolutions that feed a norm, in place.

    .. math::  \hat W_o = (W_o - \mu_o) / \sqrt{\sigma_o^2 + \epsilon}

    Every such layer's ``weight`` becomes a ``torch.nn.utils.parametrize`` parametrization. The raw
    weight stays the same parameter (an optimizer keeps it), under the name
    ``parametrizations.weight.original``. A layer that is standardised already is left alone, so
    twice is once. A layer that one forward uses several times is standardised once a forward.

    Attach after the weights are initialised or loaded: ``nn.init`` on a computed weight has no
    effect. With ``preserve`` make the optimizer afterwards, or give it the new parameters.

    Args:
        model: Changed in place.
        where: ``where(module, name)`` says of every convolution and linear layer whether to touch
            it; None takes the convolutions whose output goes into a normalization layer: a
            module, not a function such as ``F.group_norm``.
        preserve: Learn a gain and an offset of each filter that start where the model's function
            stays what it is.
        center: Subtract the filter's mean.
        scale: Divide by the filter's standard deviation.
        eps: Added to the variance, or as ``eps_to`` says; timm's checkpoints have 1e-6.
        unbiased: Divide the squares by ``fan-in - 1``.
        eps_to: ``"variance"``, or ``"std"`` as in the authors' first release.
        gain: Learn a gain of each filter that starts at 1.
        example_input: Sent through the model once if ``torch.fx`` cannot trace it: a tuple of
            arguments, a dict of named ones, or the only one.

    Returns:
        What was changed, and what was not and why.

    Raises:
        WeightError: If a chosen layer has filters of a single value or no plain weight.
        TraceError: If the model cannot be traced and there is no ``where``.
        OptionError: If the model is wrapped for data-parallel training or compiled.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, section 4.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
        >>> print(standardize_weights_(model))
        standardized 1 layer (followed by torch.fx)
          0
        left alone 1 layer
          its output goes into the output, not into a norm: 2
    """

    def make(weight: Tensor, filters: Filters) -> WeightStandardization:
        return WeightStandardization(
            weight,
            filters,
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
    example_input: Any = None,  # noqa: ANN401
) -> WeightReport:
    r"""Learn length and direction of filters apart, in the convolutions that feed a norm.

    .. math::  \hat W_o = g_o W_o / \lVert W_o \rVert

    Args:
        model: Changed in place; its function stays what it is.
        where: As in ``standardize_weights_``.
        eps: Added to the squared length.
        example_input: As in ``standardize_weights_``.

    Returns:
        What was changed, and what was not and why.

    Raises:
        WeightError: If a chosen layer has no plain weight.
        TraceError: If the model cannot be traced and there is no ``where``.
        OptionError: If the model is wrapped for data-parallel training or compiled.

    Source:
        Salimans & Kingma 2016, arXiv:1602.07868.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> weight_norm_(model).changed
        ('0',)
    """

    def make(weight: Tensor, filters: Filters) -> WeightNorm:
        return WeightNorm(weight, filters, eps=eps)

    return attach_(model, make, "weight-normalized", where, example_input)


def centered_weight_norm_(
    model: nn.Module,
    where: Where | None = None,
    *,
    gain: float = 1.414,
    eps: float = LENGTH_EPS,
    example_input: Any = None,  # noqa: ANN401
) -> WeightReport:
    r"""Give filters mean 0 and a learned length, in the convolutions that feed a norm.

    .. math::  \hat W_o = g_o (W_o - \mu_o) / \lVert W_o - \mu_o \rVert

    Args:
        model: Changed in place.
        where: As in ``standardize_weights_``.
        gain: Length at which every filter starts.
        eps: Added to the squared length.
        example_input: As in ``standardize_weights_``.

    Returns:
        What was changed, and what was not and why.

    Raises:
        WeightError: If a chosen layer has filters of a single value or no plain weight.
        TraceError: If the model cannot be traced and there is no ``where``.
        OptionError: If the model is wrapped for data-parallel training or compiled.

    Source:
        Huang et al. 2017, Centered Weight Normalization in Accelerating Training of Deep Neural
        Networks.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> centered_weight_norm_(model).changed
        ('0',)
    """

    def make(weight: Tensor, filters: Filters) -> CenteredWeightNorm:
        return CenteredWeightNorm(weight, filters, gain=gain, eps=eps)

    return attach_(model, make, "centred and weight-normalized", where, example_input)


@all_or_nothing
def attach_(
    model: nn.Module,
    make: Make,
    done: str,
    where: Where | None,
    example_input: Any,  # noqa: ANN401
) -> WeightReport:
    """Reparametrise the chosen layers' weights; everything is checked before anything changes."""
    require_unwrapped(model, "reparametrise")
    layers = {name: module for name, module in model.named_modules() if is_producer(module)}
    feeds = _followed(model, where, example_input)
    why_not = {name: _why_not(name, module, feeds, where) for name, module in layers.items()}
    skipped = {name: reason for name, reason in why_not.items() if reason}
    rules = {name: _made(make, name, m) for name, m in layers.items() if name not in skipped}
    several = [rule for name, rule in rules.items() if _is_called_again(name, feeds)]
    if several:
        once = OncePerForward(model)
        for rule in several:
            rule.once = once
    for name, rule in rules.items():
        if parametrize.is_parametrized(layers[name]):  # of a bias, say, by somebody else
            take_class_of_its_own(layers[name])
        parametrize.register_parametrization(layers[name], "weight", rule)
        make_picklable_(layers[name])
    how = "as where= says" if where else f"followed by {feeds.how}" if feeds else ""
    return WeightReport(done=done, changed=tuple(rules), skipped=skipped, how=how)


def take_class_of_its_own(module: nn.Module) -> None:
    """Leave the class that torch made for this layer to its deep copies, which share it.

    ``parametrize`` adds the computed ``weight`` to the class, or deletes it from there.
    """
    shared = type(module)
    own = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    module.__class__ = own  # type: ignore[assignment]


def rules_of(module: nn.Module) -> list[Reparametrization]:
    """Our reparametrisations of a module's weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return []
    chain = module.get_submodule("parametrizations").get_submodule("weight").children()
    return [rule for rule in chain if isinstance(rule, Reparametrization)]


def _followed(model: nn.Module, where: Where | None, example_input: Any) -> Feeds | None:  # noqa: ANN401
    """Find who feeds whom, or None where that cannot be known and ``where`` decides anyway."""
    try:
        return trace_feeds(model, example_input)
    except TraceError as error:
        if where is None:
            raise TraceError(f"{error}; or say with where= which layers to touch") from error
    return None


def _why_not(name: str, module: nn.Module, feeds: Feeds | None, where: Where | None) -> str | None:
    """Say why a layer is left alone, or None if it is to be touched."""
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
    if type(module).__name__.startswith(OWN_FORWARD):
        return f"{type(module).__name__} standardises its weight itself"
    if feeds is None or name not in feeds.calls:
        return "the forward does not call it"
    if not any(pair.producer == name for pair in feeds.pairs):
        return f"its output goes into {', '.join(feeds.destinations[name])}, not into a norm"
    return None


def _is_called_again(name: str, feeds: Feeds | None) -> bool:
    """Whether one forward may call the layer more than once."""
    return feeds is None or feeds.calls.get(name) != 1


@torch.inference_mode(False)  # gains and offsets are to learn, wherever this is called
def _made(make: Make, name: str, module: nn.Module) -> Reparametrization:
    """Build the rule for one layer; what it refuses is said with the layer's name.

    Raises:
        WeightError: If the filters have a single value, or the weight is no plain parameter.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or isinstance(weight, nn.UninitializedParameter):
        raise WeightError(
            f"the weight of layer {name!r} ({type(module).__name__}) is no plain parameter: it is "
            f"not there yet, or computed by something else; leave it out with where=, or in "
            f"convert_norm_ give the norm behind it a spec without +ws"
        )
    try:
        rule = make(weight, Filters.of(module))
    except NormError as error:
        raise type(error)(f"layer {name!r} ({type(module).__name__}): {error}") from error
    return rule.requires_grad_(weight.requires_grad).train(module.training)
