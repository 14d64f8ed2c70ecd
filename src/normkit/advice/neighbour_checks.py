"""Checks of the layers before a norm, and of the modules that contain it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.advice.finding import Finding
from normkit.advice.fixes import equivalent_call, trackers
from normkit.advice.registry import check
from normkit.advice.situation import CheckedNorm, Situation, switches
from normkit.layers.base import NormLayer

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@check("repeated by checkpointing")
def repeated_by_checkpointing(situation: Situation) -> Iterator[Finding]:
    """Find torch's batch norms whose forward a gradient checkpoint runs twice a step."""
    for norm in situation.norms:
        is_torchs = isinstance(norm.module, _BatchNorm) and not isinstance(norm.module, NormLayer)
        updates = is_torchs and norm.trains and any(trackers(norm))
        how = _checkpointed_by(situation, norm) if updates else None
        if how is not None:
            yield Finding(
                name=norm.name,
                what=f"it runs under gradient checkpointing ({how})",
                why="the forward is repeated in the backward pass, and updates the running "
                "statistics twice a step",
                fix=_fix_checkpointing(situation, norm),
                severity="warning",
            )


def _fix_checkpointing(situation: Situation, norm: CheckedNorm) -> str:
    found = equivalent_call(situation, norm)
    if found is None:
        return "do not checkpoint the module that contains it"
    return f"{found}, which updates them once a step"


def _checkpointed_by(situation: Situation, norm: CheckedNorm) -> str | None:
    """Say how a norm is known to be checkpointed; None if it is not.

    If a call of ``torch.utils.checkpoint`` was seen, only calls count. Otherwise a switch of a
    module around the norm counts.
    """
    if any(each.repeated for each in situation.norms):
        return "torch.utils.checkpoint calls it" if norm.repeated else None
    for holder, switch in switches(situation.model):
        if any(module is norm.module for module in holder.modules()):
            return f"{switch}=True in {type(holder).__name__}"
    return None


@check("wasted bias")
def wasted_bias(situation: Situation) -> Iterator[Finding]:
    """Find biases that the following norm subtracts again."""
    for pair in situation.feeds.pairs if situation.feeds else ():
        norm, producer = situation.norm(pair.norm), situation.model.get_submodule(pair.producer)
        cancels = norm is not None and norm.trains and _ignores_channel_shifts(norm)
        if cancels and producer.bias is not None and pair.exclusive and not pair.through:
            yield Finding(
                name=pair.producer,
                what=f"its bias goes into {pair.norm or 'the norm'} and nowhere else",
                why="the norm subtracts each channel's mean, and the bias with it",
                fix="bias=False when building; in a trained model first subtract it from the "
                "norm's running_mean",
                severity="note",
            )


def _ignores_channel_shifts(norm: CheckedNorm) -> bool:
    """Whether in training a constant added to a channel does not change the norm's output."""
    found = list(norm.usable)
    first = [pool for pool in found if pool.part.name in ("batch stage", "batch norm")]
    # GroupNormPlus begins with a group norm, and SwitchableNorm mixes several norms.
    if type(norm.module).__name__.startswith(("GroupNormPlus", "SwitchableNorm")):
        return False
    return bool(found) and all(p.of_input and p.by_channel for p in first or found)


@check("dropout before the norm")
def dropout_before(situation: Situation) -> Iterator[Finding]:
    """Find norms with batch statistics behind dropout, which is inactive at evaluation."""
    for pair in situation.feeds.pairs if situation.feeds else ():
        norm = situation.norm(pair.norm)
        drops = (_dropout(situation.model, name) for name in pair.through)
        drop = next((found for found in drops if found), None)
        if norm is not None and norm.trains and drop and any(p.over_batch for p in norm.usable):
            yield Finding(
                name=pair.norm,
                what=f"{drop} stands between {pair.producer} and this norm",
                why="dropout increases the variance in training only, so that the running variance "
                "is too large at evaluation",
                fix="put the dropout after the norm, best after the last one",
                severity="warning",
            )


def _dropout(model: nn.Module, name: str) -> str | None:
    """Describe a layer, or a function, of this name if it is a dropout; otherwise None."""
    module = dict(model.named_modules()).get(name)
    if module is None:
        return f"a call of {name}" if name.startswith("dropout") else None
    drops = isinstance(module, DROPOUTS) and module.p > 0
    return f"{type(module).__name__} {name}" if drops else None


@check("model not followed")
def not_followed(situation: Situation) -> Iterator[Finding]:
    """Report a model whose connections between layers are unknown."""
    if situation.feeds is None:
        yield Finding(
            name="",
            what="neither torch.fx nor the example shows which layers feed the norms",
            why="wasted biases and dropout before norms were not looked for",
            fix="look for both by hand",
            severity="note",
        )
