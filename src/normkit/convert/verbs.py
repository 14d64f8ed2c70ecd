"""Converting the norms of a model: in place, and on a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normkit.convert.calibration import Calibrator
from normkit.convert.carry_out import carry_out
from normkit.convert.plan import feeding, plan
from normkit.convert.report import Conversion
from normkit.convert.selection import SpecMap, Where, choose, find_norms
from normkit.errors import OptionError
from normkit.passes import Forward, all_or_nothing, changes_nothing, require_unwrapped
from normkit.spec import NormSpec


@all_or_nothing
def convert_norm_(  # noqa: PLR0913 - what to convert, what follows, what is only known by the user
    model: nn.Module,
    spec: str | NormSpec | SpecMap,
    *,
    where: Where | None = None,
    optimizer: Optimizer | None = None,
    calibrate: Iterable[Any] | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    example_input: Any = None,  # noqa: ANN401
    dry_run: bool = False,
) -> Conversion:
    """Replace the norms of a model by others, in place.

    Everything is checked before anything changes, and an interruption leaves the model as it was.
    Scale, shift, running statistics, eps, momentum, activation, hooks, mode, dtype, device,
    ``requires_grad`` and what others have hung on the layer are carried wherever the new layer has
    a place for them; parameters that fit are carried as the very same objects. Layers that are
    already what is asked for stay.

    Args:
        model: Any model with norms of torch, torchvision, timm, detectron or normkit.
        spec: What every norm becomes: ``"gn:32"`` or a ``NormSpec``; with ``+ws`` the weights of
            the convolutions that feed them are standardised. Or a dict from names to specs, of
            which the first that matches counts: ``"layer1.*"`` and ``"head"`` (with all inside),
            ``"re:..."`` for a regular expression of the whole name; None leaves a norm alone, and
            so does no match.
        where: ``where(module, name)`` says of each norm whether it is meant.
        optimizer: Follows: parameters that no longer exist leave it, new ones join the group of
            the old layer's, all others keep their state.
        calibrate: Batches (inputs, pairs or dicts; a finite iterable, read once and kept): from
            front to back, running statistics, and scale and shift of every channel (of every group
            in ``bcn``), are set so that each new layer's outputs have the mean and variance of the
            old one's, and ``+ws`` keeps the weights' own gain and offset. The report tells how
            near the outputs then are.
        forward: ``forward(model, batch)`` sends a batch through the model, if it is none of these.
        batch_size: Examples per worker, for ``bgn:auto``.
        example_input: A tuple of arguments, a dict of named ones, or the only one. It is sent
            through the model before and after, in evaluation mode and in the model's own: what
            fails then, or no longer calls a norm, is refused; without it the report says whose
            forward was not run. Also for ``+ws``, if ``torch.fx`` cannot trace the model.
        dry_run: Only report what would be done.

    Returns:
        The model and a report that can be printed, pickled and reverted. Use its ``.model`` where
        the model itself may be a norm.

    Raises:
        ConversionError: If a layer has no rule, a lazy layer is empty, a forward reads what the new
            layer does not have, or something would go on using the old one; all are named. Also if
            the converted model fails on the example input.
        PartitionError: If groups do not divide the channels; all such layers are named.
        SpecError: If a spec cannot be read, or needs the batch size.
        OptionError: If a pattern or ``where`` matches nothing, the model has no norm, is wrapped or
            compiled, or the optimizer is another model's.
        TraceError: If ``+ws`` cannot trace the model, or the model does not take the example.
        WeightError: If ``+ws`` meets a filter of a single value.
        DataError: If ``calibrate`` gives no batch, or one that needs ``forward``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(convert_norm_(model, "gn:4"))
        converted 1 of 1 norms
          name  old             new   carried       lost
          1     BatchNorm2d(8)  gn:4  weight, bias  running statistics
    """
    require_unwrapped(model, "convert")
    if forward is not None and calibrate is None:
        raise OptionError("forward= was given without calibrate=, which it is for")
    found = find_norms(model)
    chosen = choose(found, spec, where)
    planned = plan(model, found, chosen, batch_size)
    standardize = feeding(model, found, chosen.specs, example_input)
    calibrator = None
    if calibrate is not None and not dry_run:
        calibrator = Calibrator(model, planned.steps, calibrate, forward)
    return carry_out(model, planned, standardize, optimizer, example_input, dry_run, calibrator)


@changes_nothing
def convert_norm(  # noqa: PLR0913 - as convert_norm_, without an optimizer
    model: nn.Module,
    spec: str | NormSpec | SpecMap,
    *,
    where: Where | None = None,
    calibrate: Iterable[Any] | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    example_input: Any = None,  # noqa: ANN401
    dry_run: bool = False,
) -> Conversion:
    """Replace the norms of a copy of a model; see ``convert_norm_``.

    Args:
        model: Left as it is.
        spec: As in ``convert_norm_``.
        where: As in ``convert_norm_``, with the modules of the copy.
        calibrate: As in ``convert_norm_``.
        forward: As in ``convert_norm_``.
        batch_size: As in ``convert_norm_``.
        example_input: As in ``convert_norm_``.
        dry_run: As in ``convert_norm_``.

    Returns:
        The copy, as ``.model``, and the report.

    Raises:
        NormError: As ``convert_norm_`` does.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> convert_norm(model, "bgn:2").model[1].num_groups, type(model[1]).__name__
        (2, 'BatchNorm2d')
    """
    with torch.inference_mode(False):  # the copy is to learn, wherever this is called
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
