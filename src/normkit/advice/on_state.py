"""Checks of what a norm holds: buffers, parameters, and which of them move."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from normkit.advice.finding import Finding
from normkit.advice.fixes import COUNT, RECALIBRATE, frozen, same, trackers, twin_of
from normkit.advice.registry import check
from normkit.advice.situation import Norm, Situation
from normkit.convert.selection import find_lookalikes
from normkit.convert.target import MIN_SAFE_EPS
from normkit.inference.freeze import is_frozen
from normkit.layers.base import BUFFERS, NormLayer


@check("broken values")
def broken_values(situation: Situation) -> Iterator[Finding]:
    """NaN or infinity in parameters and buffers, or a negative variance."""
    for norm in situation.norms:
        for name, tensor in norm.module.state_dict().items():
            count = _count_broken(name, tensor)
            if count:
                yield Finding(
                    name=norm.name,
                    what=f"{name}: {count} of {tensor.numel()} values are NaN, infinite or no "
                    f"variance",
                    why="the results are not finite, and running statistics never recover",
                    fix=_whole_again(situation, norm, name),
                    severity="error",
                )


def _whole_again(situation: Situation, norm: Norm, name: str) -> str:
    """Say how broken values are replaced without those that are not."""
    statistics = name.endswith(BUFFERS)
    if statistics and situation.trained:
        return f"{RECALIBRATE} measures them anew, and leaves what was learned alone"
    if situation.trained:
        return "load a checkpoint from before: nothing else brings learned values back"
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
    """Running statistics in 16 bits."""
    for norm in situation.norms:
        dtypes = {layer.get_buffer(BUFFERS[0]).dtype for _, layer in trackers(norm)}
        narrow = next((dtype for dtype in dtypes if dtype.itemsize < 4), None)
        if narrow is not None:
            yield Finding(
                name=norm.name,
                what=f"running statistics are {str(narrow).removeprefix('torch.')}",
                why="small steps are rounded away: the averages stall far from their goal",
                fix=_wide(situation, norm),
                severity="warning",
            )


def _wide(situation: Situation, norm: Norm) -> str:
    twin = twin_of(norm.module)
    found = same(situation, norm, twin) if twin else None
    if found is None:
        return f'model.get_submodule("{norm.name}").float()'
    return f"{found}, which keeps them in float32; or keep this layer in float32"


@check("no statistics yet")
def stale_statistics(situation: Situation) -> Iterator[Finding]:
    """Running statistics that no batch has moved."""
    tracking = [n for n in situation.norms if n.called and any(_uses_running(n))]
    stale = [norm for norm in tracking if all(map(_is_fresh, _uses_running(norm)))]
    new = len(stale) == len(tracking)  # a new model, which training will fill
    for norm in stale:
        if new and norm.trains:
            continue
        yield Finding(
            name=norm.name,
            what="running statistics are 0 and 1, and num_batches_tracked is 0",
            why="evaluation uses them as they are: it subtracts 0 and divides by 1",
            fix=f"load the whole checkpoint, or train before evaluating; {RECALIBRATE} measures "
            f"the statistics alone",
            severity="note" if norm.trains else "warning",
        )


def _uses_running(norm: Norm) -> Iterator[nn.Module]:
    """Layers whose running statistics evaluation looks at."""
    return (layer for _, layer in trackers(norm) if getattr(layer, "example_weight", 0) < 1)


def _is_fresh(layer: nn.Module) -> bool:
    values = {name: layer.get_buffer(name) for name in (*BUFFERS, COUNT)}
    expected = dict(zip(values, (0, 1, 0), strict=True))
    return all(not v.is_meta and bool((v == expected[n]).all()) for n, v in values.items())


@check("channels without variance")
def zero_variance(situation: Situation) -> Iterator[Finding]:
    """Channels whose running variance is 0."""
    for norm in situation.norms:
        for _, layer in trackers(norm):
            var = layer.get_buffer(BUFFERS[1])
            count = 0 if var.is_meta else int((var == 0).sum())
            if count:
                factor = 1 / math.sqrt(max(float(getattr(layer, "eps", 1e-5)), 1e-38))
                yield Finding(
                    name=norm.name,
                    what=f"running_var is 0 in {count} of {var.numel()} channels",
                    why=f"they never varied in training; evaluation multiplies whatever differs "
                    f"there by 1/sqrt(eps), {factor:.0f}",
                    fix=f"find out why the layer before is constant there; {RECALIBRATE} measures "
                    f"the statistics anew",
                    severity="warning",
                )


@check("constant channels")
def constant_channels(situation: Situation) -> Iterator[Finding]:
    """Channels whose scale is 0."""
    for norm in situation.norms:
        for name, weight in norm.module.named_parameters():
            count = 0 if weight.is_meta else int((weight == 0).sum())
            if name.endswith("weight") and count:
                every = count == weight.numel()
                yield Finding(
                    name=norm.name,
                    what=f"{name} is 0 in {'all' if every else count} of {weight.numel()} channels",
                    why="the result there is the bias, whatever the input"
                    + ("; meant so where it ends a residual branch" if every else ""),
                    fix=_alive(situation, every),
                    severity="note",
                )


def _alive(situation: Situation, every: bool) -> str:
    if every:
        return "nothing, if it is meant to start there"
    if situation.trained:
        return "prune them: nothing of the input comes through"
    return "start them above 0"


@check("frozen for now")
def frozen_for_now(situation: Situation) -> Iterator[Finding]:
    """Norms that look frozen and are not, or are until somebody calls ``train()``."""
    for norm in situation.norms:
        layers = [layer for _, layer in trackers(norm) if not is_frozen(layer)]
        if not (situation.training and layers):
            continue
        freeze = frozen(*(name for name, layer in trackers(norm) if not is_frozen(layer)))
        if not norm.trains:
            yield _frozen(
                norm,
                "in evaluation mode inside a model in training mode",
                "the model's next .train() thaws it, and its statistics move again",
                f"{freeze}, which holds in any mode",
            )
        elif all(_is_fixed(layer) for layer in layers):
            yield _frozen(
                norm,
                "weight and bias do not learn, and the running statistics still move",
                "training changes the result of a layer that was meant to stay",
                f"{freeze}, which holds in any mode",
            )
        elif any(getattr(layer, "momentum", None) == 0 for layer in layers):
            yield _frozen(
                norm,
                "momentum is 0: the running statistics never move",
                "training normalises by the batch, evaluation by something else",
                f"{freeze}, or set its momentum to 0.1",
            )
        elif any(getattr(layer, "track_running_stats", True) is False for layer in layers):
            yield _frozen(
                norm,
                "track_running_stats was switched off: the running statistics stand still",
                "training normalises by the batch, evaluation by the statistics that are there",
                f"{freeze}, or set its track_running_stats to True",
            )


def _is_fixed(layer: nn.Module) -> bool:
    own = list(layer.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _frozen(norm: Norm, what: str, why: str, fix: str) -> Finding:
    return Finding(name=norm.name, what=what, why=why, fix=fix, severity="warning")


@check("eps near 0")
def eps_near_zero(situation: Situation) -> Iterator[Finding]:
    """An eps with which a group without variance is not normalised to 0."""
    for norm in situation.norms:
        eps = getattr(norm.module, "eps", None)
        small = isinstance(eps, float | int) and eps < MIN_SAFE_EPS
        if small and any(pool.of_input for pool in norm.usable):
            yield Finding(
                name=norm.name,
                what=f"eps={eps}, and it divides by the deviation of its input",
                why="a group without variance, such as a dark image, gives NaN or noise",
                fix=_with_eps(situation, norm),
                severity="warning",
            )


def _with_eps(situation: Situation, norm: Norm) -> str:
    twin = twin_of(norm.module)
    found = same(situation, norm, f"{twin}:eps=1e-05") if twin else None
    return f"{found or 'set its eps to 1e-5'}: results change where the variance is as small"


@check("average of all batches")
def cumulative_average(situation: Situation) -> Iterator[Finding]:
    """``momentum=None``."""
    for norm in situation.norms:
        layers = [layer for _, layer in trackers(norm)]
        if norm.trains and any(getattr(layer, "momentum", 0) is None for layer in layers):
            ours = isinstance(norm.module, NormLayer)
            yield Finding(
                name=norm.name,
                what="momentum=None averages all batches since the start",
                why="batches of the first, untrained weights count as much as the last ones"
                + ("" if ours else "; torch.compile breaks the graph at torch's layer"),
                fix="set momentum to 0.1; None is for a pass that measures the statistics anew",
                severity="note" if ours else "warning",
            )


@check("not looked at")
def not_looked_at(situation: Situation) -> Iterator[Finding]:
    """Norms about which little can be said, so that no check is skipped in silence."""
    for norm in situation.norms:
        kind = type(norm.module).__name__
        if not norm.called:
            yield _unknown(norm.name, f"{kind}: one forward in evaluation mode does not call it")
        elif norm.pools is None:
            yield _unknown(norm.name, f"{kind}: which values share its statistics is not known")
    for name, module in find_lookalikes(situation.model).items():
        yield _unknown(name, f"{type(module).__name__}: named like a norm, but none that is known")


def _unknown(name: str, what: str) -> Finding:
    return Finding(
        name=name,
        what=what,
        why="its statistics groups were not checked",
        fix="check it by hand; example_input= may reach what this input does not",
        severity="note",
    )
