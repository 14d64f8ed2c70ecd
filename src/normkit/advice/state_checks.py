"""Checks of a norm's buffers and parameters, and of whether training changes them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from normkit.advice.finding import Finding
from normkit.advice.fixes import COUNT, RECALIBRATE, equivalent_call, freeze_call, trackers
from normkit.advice.registry import check
from normkit.advice.situation import CheckedNorm, Situation
from normkit.convert.selection import find_lookalikes
from normkit.convert.target import MIN_SAFE_EPS
from normkit.inference.freeze import is_frozen
from normkit.layers.base import BUFFERS, NormLayer


@check("broken values")
def broken_values(situation: Situation) -> Iterator[Finding]:
    """Find NaN or infinity in parameters and buffers, and negative variances."""
    for norm in situation.norms:
        for name, tensor in norm.module.state_dict().items():
            count = _count_broken(name, tensor)
            if count:
                yield Finding(
                    name=norm.name,
                    what=f"{name}: {count} of {tensor.numel()} values are NaN, infinite, or a "
                    f"negative variance",
                    why="the results are not finite, and running statistics never recover",
                    fix=_fix_values(situation, norm, name),
                    severity="error",
                )


def _fix_values(situation: Situation, norm: CheckedNorm, name: str) -> str:
    """Say how to replace broken values, and no others."""
    statistics = name.endswith(BUFFERS)
    if statistics and situation.trained:
        return f"{RECALIBRATE} measures them anew, and does not change learned values"
    if situation.trained:
        return "load a checkpoint from before: learned values cannot be restored otherwise"
    place = f'model.get_submodule("{norm.name}")'
    return f"{place}.reset_{'running_stats' if statistics else 'parameters'}()"


def _count_broken(name: str, tensor: Tensor) -> int:
    if tensor.is_meta or not tensor.is_floating_point():
        return 0
    broken = ~tensor.isfinite()
    if name.endswith("running_var"):
        broken |= tensor < 0
    return int(broken.sum())


@check("16-bit running statistics")
def narrow_statistics(situation: Situation) -> Iterator[Finding]:
    """Find running statistics in 16 bits."""
    for norm in situation.norms:
        dtypes = {layer.get_buffer(BUFFERS[0]).dtype for _, layer in trackers(norm)}
        narrow = next((dtype for dtype in dtypes if dtype.itemsize < 4), None)
        if narrow is not None:
            yield Finding(
                name=norm.name,
                what=f"running statistics are {str(narrow).removeprefix('torch.')}",
                why="rounding loses small updates: the averages stop short of the data's",
                fix=_fix_dtype(situation, norm),
                severity="warning",
            )


def _fix_dtype(situation: Situation, norm: CheckedNorm) -> str:
    found = equivalent_call(situation, norm)
    if found is None:
        return f'model.get_submodule("{norm.name}").float()'
    return f"{found}, which keeps them in float32; or keep this layer in float32"


@check("no statistics yet")
def stale_statistics(situation: Situation) -> Iterator[Finding]:
    """Find running statistics that no batch has updated."""
    tracking = [n for n in situation.norms if n.called and any(_uses_running(n))]
    unset = [norm for norm in tracking if all(map(_is_fresh, _uses_running(norm)))]
    # If no norm has statistics, the model is new, and training will set them.
    is_new_model = len(unset) == len(tracking)
    for norm in unset:
        if is_new_model and norm.trains:
            continue
        yield Finding(
            name=norm.name,
            what="running statistics are 0 and 1, and num_batches_tracked is 0",
            why="evaluation uses them as they are: it subtracts 0 and divides by 1",
            fix=f"load the whole checkpoint, or train before evaluating; {RECALIBRATE} measures "
            f"only the statistics",
            severity="note" if norm.trains else "warning",
        )


def _uses_running(norm: CheckedNorm) -> Iterator[nn.Module]:
    """Layers whose running statistics evaluation uses."""
    return (layer for _, layer in trackers(norm) if getattr(layer, "example_weight", 0) < 1)


def _is_fresh(layer: nn.Module) -> bool:
    values = {name: layer.get_buffer(name) for name in (*BUFFERS, COUNT)}
    expected = dict(zip(values, (0, 1, 0), strict=True))
    return all(not v.is_meta and bool((v == expected[n]).all()) for n, v in values.items())


@check("channels without variance")
def zero_variance(situation: Situation) -> Iterator[Finding]:
    """Find channels whose running variance is 0."""
    for norm in situation.norms:
        for _, layer in trackers(norm):
            var = layer.get_buffer(BUFFERS[1])
            count = 0 if var.is_meta else int((var == 0).sum())
            if count:
                factor = 1 / math.sqrt(max(float(getattr(layer, "eps", 1e-5)), 1e-38))
                yield Finding(
                    name=norm.name,
                    what=f"running_var is 0 in {count} of {var.numel()} channels",
                    why=f"these channels were constant in training; evaluation multiplies any "
                    f"difference in them by 1/sqrt(eps), {factor:.0f}",
                    fix=f"find out why the layer before gives constant channels; {RECALIBRATE} "
                    f"measures the statistics anew",
                    severity="warning",
                )


@check("constant channels")
def constant_channels(situation: Situation) -> Iterator[Finding]:
    """Find channels whose scale is 0."""
    for norm in situation.norms:
        for name, weight in norm.module.named_parameters():
            count = 0 if weight.is_meta else int((weight == 0).sum())
            if name.endswith("weight") and count:
                in_all = count == weight.numel()
                yield Finding(
                    name=norm.name,
                    what=f"{name} is 0 in {'all' if in_all else count} of {weight.numel()} "
                    f"channels",
                    why="the result there is the bias, whatever the input"
                    + ("; usual at the end of a residual branch" if in_all else ""),
                    fix=_fix_scale(situation, in_all),
                    severity="note",
                )


def _fix_scale(situation: Situation, in_all: bool) -> str:
    if in_all:
        return "nothing, if training is meant to start from 0"
    if situation.trained:
        return "prune these channels: their output does not depend on the input"
    return "initialise them above 0"


@check("frozen for now")
def frozen_for_now(situation: Situation) -> Iterator[Finding]:
    """Find norms that are frozen only by accident, only in part, or only until ``train()``."""
    for norm in situation.norms:
        layers = [layer for _, layer in trackers(norm) if not is_frozen(layer)]
        if not (situation.training and layers):
            continue
        freeze = freeze_call(*(name for name, layer in trackers(norm) if not is_frozen(layer)))
        if not norm.trains:
            found = (
                "in evaluation mode inside a model in training mode",
                "the model's next .train() thaws it, and its statistics are updated again",
                f"{freeze}, which holds in any mode",
            )
        elif all(_does_not_learn(layer) for layer in layers):
            found = (
                "weight and bias do not learn, but training still updates the running statistics",
                "training changes the results of a layer that was meant to stay as it is",
                f"{freeze}, which holds in any mode",
            )
        elif any(getattr(layer, "momentum", None) == 0 for layer in layers):
            found = (
                "momentum is 0: the running statistics are never updated",
                "training normalises by the batch, evaluation by something else",
                f"{freeze}, or set its momentum to 0.1",
            )
        elif any(getattr(layer, "track_running_stats", True) is False for layer in layers):
            found = (
                "track_running_stats was switched off: the running statistics are not updated",
                "training normalises by the batch, evaluation by the old statistics",
                f"{freeze}, or set its track_running_stats to True",
            )
        else:
            continue
        what, why, fix = found
        yield Finding(name=norm.name, what=what, why=why, fix=fix, severity="warning")


def _does_not_learn(layer: nn.Module) -> bool:
    own = list(layer.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


@check("eps near 0")
def eps_near_zero(situation: Situation) -> Iterator[Finding]:
    """Find an eps that is too small to normalise a group without variance to 0."""
    for norm in situation.norms:
        eps = getattr(norm.module, "eps", None)
        small = isinstance(eps, float | int) and eps < MIN_SAFE_EPS
        if small and any(pool.of_input for pool in norm.usable):
            yield Finding(
                name=norm.name,
                what=f"eps={eps}, and it divides by the standard deviation of its input",
                why="a group without variance, such as a dark image, gives NaN or noise",
                fix=_fix_eps(situation, norm),
                severity="warning",
            )


def _fix_eps(situation: Situation, norm: CheckedNorm) -> str:
    found = equivalent_call(situation, norm, ":eps=1e-05")
    return f"{found or 'set its eps to 1e-5'}: results change where the variance is that small"


@check("average of all batches")
def cumulative_average(situation: Situation) -> Iterator[Finding]:
    """Find ``momentum=None``, which averages all batches."""
    for norm in situation.norms:
        layers = [layer for _, layer in trackers(norm)]
        if norm.trains and any(getattr(layer, "momentum", 0) is None for layer in layers):
            is_torchs = not isinstance(norm.module, NormLayer)
            yield Finding(
                name=norm.name,
                what="momentum=None averages all batches since the start",
                why="batches of the first, untrained weights count as much as the last ones"
                + ("; torch.compile breaks the graph at torch's layer" if is_torchs else ""),
                fix="set momentum to 0.1; None is for a pass that measures the statistics anew",
                severity="warning" if is_torchs else "note",
            )


@check("not looked at")
def not_looked_at(situation: Situation) -> Iterator[Finding]:
    """Report norms that could not be checked, so that no check is skipped in silence."""
    for norm in situation.norms:
        kind = type(norm.module).__name__
        if not norm.called:
            yield _unknown(norm.name, f"{kind}: a forward in evaluation mode does not call it")
        elif norm.pools is None:
            yield _unknown(norm.name, f"{kind}: it is unknown which values share its statistics")
    for name, module in find_lookalikes(situation.model).items():
        yield _unknown(name, f"{type(module).__name__}: named like a norm, but of an unknown class")


def _unknown(name: str, what: str) -> Finding:
    return Finding(
        name=name,
        what=what,
        why="its statistics groups were not checked",
        fix="check it by hand; another example_input= may reach it",
        severity="note",
    )
