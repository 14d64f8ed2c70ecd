"""Checks of what stands before and around a norm."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.advice.finding import Finding
from normkit.advice.fixes import same, trackers
from normkit.advice.registry import check
from normkit.advice.situation import Norm, Situation, switches
from normkit.layers.base import NormLayer

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@check("repeated by checkpointing")
def repeated_by_checkpointing(situation: Situation) -> Iterator[Finding]:
    """Torch's batch norms whose forward a checkpoint runs twice a step."""
    for norm in situation.norms:
        torchs = isinstance(norm.module, _BatchNorm) and not isinstance(norm.module, NormLayer)
        moves = torchs and norm.trains and any(trackers(norm))
        how = _checkpointed_by(situation, norm) if moves else None
        if how is not None:
            yield Finding(
                name=norm.name,
                what=f"it runs under activation checkpointing ({how})",
                why="the forward is repeated in the backward pass, and moves the running "
                "statistics twice a step",
                fix=_counted_once(situation, norm),
                severity="warning",
            )


def _counted_once(situation: Situation, norm: Norm) -> str:
    found = same(situation, norm, "bn")
    return f"{found}, which counts a step once" if found else "do not checkpoint what holds it"


def _checkpointed_by(situation: Situation, norm: Norm) -> str | None:
    """Say what shows that a norm is checkpointed: a call; if none is seen, a switch above it."""
    if any(each.repeated for each in situation.norms):
        return "torch.utils.checkpoint calls it" if norm.repeated else None
    for holder, switch in switches(situation.model):
        if any(module is norm.module for module in holder.modules()):
            return f"{switch}=True in {type(holder).__name__}"
    return None


@check("wasted bias")
def wasted_bias(situation: Situation) -> Iterator[Finding]:
    """Biases that the norm after them takes away again."""
    for pair in situation.feeds.pairs if situation.feeds else ():
        norm, producer = situation.norm(pair.norm), situation.model.get_submodule(pair.producer)
        cancels = norm is not None and norm.trains and _takes_means_away(norm)
        if cancels and producer.bias is not None and pair.exclusive and not pair.through:
            yield Finding(
                name=pair.producer,
                what=f"its bias goes into {pair.norm or 'the norm'} and nowhere else",
                why="the norm subtracts each channel's mean, and the bias with it",
                fix="bias=False when building; in a trained model first subtract it from the "
                "norm's running_mean",
                severity="note",
            )


def _takes_means_away(norm: Norm) -> bool:
    """Whether a value added to all of a channel changes nothing: exactly, in training."""
    found = list(norm.usable)
    first = [pool for pool in found if pool.part.name in ("batch stage", "batch norm")]
    if type(norm.module).__name__.startswith(("GroupNormPlus", "SwitchableNorm")):
        return False  # a mixture, or a group norm first
    return bool(found) and all(p.of_input and p.by_channel for p in first or found)


@check("dropout before the norm")
def dropout_before(situation: Situation) -> Iterator[Finding]:
    """Batch statistics of values that dropout has changed, which evaluation does not see."""
    for pair in situation.feeds.pairs if situation.feeds else ():
        norm = situation.norm(pair.norm)
        drops = (_dropout(situation.model, name) for name in pair.through)
        drop = next((found for found in drops if found), None)
        if norm is not None and norm.trains and drop and any(p.over_batch for p in norm.usable):
            yield Finding(
                name=pair.norm,
                what=f"{drop} stands between {pair.producer} and this norm",
                why="dropout widens the variance in training only, so that the running variance "
                "is too large at evaluation",
                fix="put the dropout after the norm, best after the last one",
                severity="warning",
            )


def _dropout(model: nn.Module, name: str) -> str | None:
    """Describe an operation of this name if it drops values: a layer that does, or a function."""
    module = dict(model.named_modules()).get(name)
    if module is None:
        return f"a call of {name}" if name.startswith("dropout") else None
    drops = isinstance(module, DROPOUTS) and module.p > 0
    return f"{type(module).__name__} {name}" if drops else None


@check("model not followed")
def not_followed(situation: Situation) -> Iterator[Finding]:
    """A model about whose connections nothing is known."""
    if situation.feeds is None:
        yield Finding(
            name="",
            what="neither torch.fx nor the example shows what feeds the norms",
            why="wasted biases and dropout before norms were not looked for",
            fix="compare by hand",
            severity="note",
        )
