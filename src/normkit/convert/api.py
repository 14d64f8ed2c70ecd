"""The public functions that convert the norms of a model: in place, and on a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normkit.convert.calibration import Calibrator, calibration_example
from normkit.convert.execute import execute_plan, to_torch_
from normkit.convert.plan import layers_to_standardize, make_plan
from normkit.convert.report import Conversion
from normkit.convert.selection import SpecMap, Where, choose, find_norms
from normkit.errors import OptionError
from normkit.passes import Forward, all_or_nothing, changes_nothing, require_unwrapped
from normkit.spec import NormSpec


@all_or_nothing
def convert_norm_(  # noqa: PLR0913 - keyword options, each independent of the others
    model: nn.Module,
    spec: str | NormSpec | SpecMap,
    *,
    where: Where | None = None,
    optimizer: Optimizer | None = None,
    calibrate: Iterable[Any] | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    example_input: Any = None,
    dry_run: bool = False,
) -> Conversion:
    """Replace the norms of a model by others, in place.

    Everything is checked before anything is changed, and an interruption leaves the model
    unchanged. A new layer takes over the old layer's scale, shift, running statistics, eps,
    momentum, activation, hooks, mode, dtype, device, ``requires_grad`` and added attributes, as far
    as it has a place for them. Parameters that fit stay the same objects. A norm that already is
    what the spec says is not replaced.

    Args:
        model: Any model with norms of torch, torchvision, timm, detectron or normkit.
        spec: The new norm: ``"gn:32"`` or a ``NormSpec``. ``+ws`` also standardises the weights of
            the convolutions that feed these norms. Or a dict from patterns to specs, where the
            first pattern that matches a norm's name counts: ``"layer1.*"``, ``"head"`` (which
            includes everything inside), or ``"re:..."`` with a regular expression for the whole
            name. A norm stays if its spec is None or no pattern matches.
        where: ``where(module, name)`` returns whether to convert a norm.
        optimizer: Edited to match the model: parameters that no longer exist leave it, new ones
            join the group of the old layer's parameters, all others keep their state.
        calibrate: Batches on which to calibrate the new norms: inputs, pairs or dicts, in a finite
            iterable that is read once into a list. In the order of the forward, the running
            statistics and the scale and shift of every channel (in ``bcn`` of every group) are set
            so that each new layer's outputs have the mean and variance of the old layer's. ``+ws``
            then preserves the gain and offset of each filter. The report says how well the outputs
            agree with the original's.
        forward: ``forward(model, batch)`` sends a batch of another form through the model.
        batch_size: Examples per worker, for ``bgn:auto``.
        example_input: A tuple of arguments, a dict of keyword arguments, or a single argument. It
            is sent through the model before and after the conversion, in evaluation mode and in
            the model's own mode; the conversion is refused if the forward then fails or calls a
            norm less or more often. Without it, the report lists the classes whose forward was not
            checked. It is also used for ``+ws`` if ``torch.fx`` cannot trace the model; the first
            batch of a list in ``calibrate`` serves as well.
        dry_run: Whether to only report what would be done.

    Returns:
        A report with the model, which can be printed, pickled and reverted. If the model is itself
        a norm, the new norm is the report's ``.model``.

    Raises:
        ConversionError: If a layer has no rule, a lazy layer is not initialised, a forward reads an
            attribute that the new layer lacks, or something is bound to the old layer; the error
            names all such layers. Also if the converted model fails on the example input.
        PartitionError: If groups do not divide the channels; the error names all such layers.
        SpecError: If a spec cannot be read, or needs the batch size.
        OptionError: If a pattern or ``where`` matches nothing, the model has no norm, is wrapped or
            compiled, or the optimizer holds no parameter of the model.
        TraceError: If ``+ws`` cannot trace the model, or the model does not accept the example.
        WeightError: If ``+ws`` meets a filter of a single value.
        DataError: If ``calibrate`` has no batch, or a batch that needs ``forward``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(convert_norm_(model, "gn:4"))
        converted 1 of 1 norms
          name  old             new   carried       lost
          1     BatchNorm2d(8)  gn:4  weight, bias  running statistics
    """
    require_unwrapped(model, "convert")
    if forward is not None and calibrate is None:
        raise OptionError("forward= was given without calibrate=; only calibrate= uses it")
    found = find_norms(model)
    chosen = choose(found, spec, where)
    planned = make_plan(model, found, chosen, batch_size)
    example = calibration_example(model, calibrate) if example_input is None else example_input
    standardize = layers_to_standardize(model, found, chosen.specs, example)
    calibrator = None
    if calibrate is not None and not dry_run:
        calibrator = Calibrator(model, planned.replacements, calibrate, forward)
    preserved = () if calibrator is None else standardize
    return execute_plan(
        model, planned, standardize, optimizer, example_input, dry_run, calibrator, preserved
    )


@changes_nothing
def convert_norm(  # noqa: PLR0913 - the options of convert_norm_, except the optimizer
    model: nn.Module,
    spec: str | NormSpec | SpecMap,
    *,
    where: Where | None = None,
    calibrate: Iterable[Any] | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    example_input: Any = None,
    dry_run: bool = False,
) -> Conversion:
    """Replace the norms of a copy of a model; see ``convert_norm_``.

    Args:
        model: The model; it is not changed.
        spec: As in ``convert_norm_``.
        where: As in ``convert_norm_``, with the modules of the copy.
        calibrate: As in ``convert_norm_``.
        forward: As in ``convert_norm_``.
        batch_size: As in ``convert_norm_``.
        example_input: As in ``convert_norm_``.
        dry_run: As in ``convert_norm_``.

    Returns:
        A report with the converted copy as ``.model``.

    Raises:
        NormError: As ``convert_norm_`` does.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> convert_norm(model, "bgn:2").model[1].num_groups, type(model[1]).__name__
        (2, 'BatchNorm2d')
    """
    with torch.inference_mode(False):  # a copy created in inference mode could not be trained
        copied = copy.deepcopy(model)
    return convert_norm_(
        copied,
        spec,
        where=where,
        calibrate=calibrate,
        forward=forward,
        batch_size=batch_size,
        example_input=example_input,
        dry_run=dry_run,
    )


@all_or_nothing
def back_to_torch_(
    model: nn.Module,
    where: Where | None = None,
    *,
    optimizer: Optimizer | None = None,
    example_input: Any = None,
) -> Conversion:
    """Replace normkit's layers by torch's that compute the same, in place.

    It is for models that were built with normkit's layers; after a conversion, and for what becomes
    what, see ``Conversion.back_to_torch``.

    Args:
        model: Changed in place.
        where: ``where(module, name)`` returns whether to replace a layer.
        optimizer: Checked as in ``convert_norm_``.
        example_input: As in ``convert_norm_``. Batch and instance norms need it, because torch has
            a class for each number of spatial axes.

    Returns:
        A report with the model, which can be reverted.

    Raises:
        OptionError: If torch has none of the layers, or the model is wrapped or compiled.
        ConversionError: If something that was added to a layer cannot be transferred.
        TraceError: If the model does not accept the example input.

    Example:
        >>> from normkit import BatchNorm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm(8))
        >>> type(back_to_torch_(model, example_input=torch.zeros(2, 3, 8, 8)).model[1]).__name__
        'BatchNorm2d'
    """
    require_unwrapped(model, "convert")
    return to_torch_(model, where, {}, optimizer, example_input)
