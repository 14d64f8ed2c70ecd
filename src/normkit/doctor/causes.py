"""Name the causes of a bad evaluation, and measure how much of the loss each one explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from normkit.diagnostics import EstimationShift
from normkit.doctor.diagnosis import SMALLEST_SHARE, Cause
from normkit.doctor.judge import Scores
from normkit.doctor.states import Patient
from normkit.doctor.symptoms import (
    SYMPTOMS,
    THAWED,
    Case,
    Symptom,
    group_by_symptom,
    is_near,
)
from normkit.layers.base import BUFFERS
from normkit.tune.gain import Gain

BATCH_SHARE = 0.5
"""Batch statistics must remove this share of the remaining loss to show an estimation shift.

Examples of one batch carry information about each other, so a smaller gain is no fault.
"""
AS_IT_IS = "as the model is"
RECALIBRATED = "measured anew on the training data"
RESTORED = "of the first checkpoint"
ADAPTED = "measured anew on other test inputs"
BY_BATCH = "of each test batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongStatistics:
    """Which layers have wrong running statistics, and what they cost.

    Args:
        causes: Why the statistics are wrong.
        symptoms: The symptom of each wrong layer, by the layer's name; empty if new statistics
            do not make the loss smaller.
        returns: Loss that comes back when one layer alone keeps its old statistics, by the layer's
            name; empty if new statistics do not make the loss smaller.
    """

    causes: tuple[Cause, ...] = ()
    symptoms: Mapping[str, str]
    returns: Mapping[str, float]


def find_wrong_statistics(
    patient: Patient, case: Case, scores: Mapping[str, Scores]
) -> WrongStatistics:
    """Find the layers with wrong statistics, sort them by symptom, and measure what they cost."""
    causes = list(_restored(case, scores))
    recalibrated = scores.get(RECALIBRATED)
    whole = recalibrated.gain_over(scores[AS_IT_IS]) if recalibrated else None
    if recalibrated is None or whole is None or not _is_large(whole, scores):
        return WrongStatistics(causes=tuple(causes), symptoms={}, returns={})

    def returning(names: Sequence[str], what: str) -> Gain:
        """Measure the loss that comes back when only these layers keep their old statistics."""
        values = {name: row.old if name in names else row.new for name, row in case.rows.items()}
        return recalibrated.gain_over(patient.with_statistics(values, f"judging {what}"))

    returns = {name: returning((name,), name).mean for name in case.rows}
    costly = SMALLEST_SHARE * whole.mean
    wrong = [name for name in case.rows if returns[name] >= costly or not is_near(case, name)]
    groups = group_by_symptom(case, wrong)
    for symptom in SYMPTOMS:
        layers = groups.get(symptom.name, ())
        if layers and symptom.name not in {cause.name for cause in causes}:
            gain = whole
            if len(groups) > 1:
                # A mixture of old and new statistics can be worse than all old statistics
                # together, so a cause explains at most the gain of all new statistics.
                gain = min(returning(layers, "these layers"), whole, key=lambda gain: gain.mean)
            causes += _cause(symptom, symptom.what(case, layers), layers, gain, scores)
    return WrongStatistics(
        causes=tuple(causes),
        symptoms={name: symptom for symptom, layers in groups.items() for name in layers},
        returns=returns,
    )


def _is_large(gain: Gain, scores: Mapping[str, Scores]) -> bool:
    """Whether a gain is certain and at least a twentieth of the model's loss as it is."""
    loss = abs(scores[AS_IT_IS].mean_loss)
    return gain.significant and gain.mean >= SMALLEST_SHARE * loss


def _restored(case: Case, scores: Mapping[str, Scores]) -> Iterator[Cause]:
    """Blame thawed layers if the first checkpoint's statistics are better than new ones."""
    if RESTORED not in scores:
        return
    restored, recalibrated = scores[RESTORED], scores[RECALIBRATED]
    if restored.mean_loss < recalibrated.mean_loss:
        layers, gain = thawed(case), restored.gain_over(scores[AS_IT_IS])
        yield from _cause(THAWED, THAWED.what(case, layers), layers, gain, scores)


def thawed(case: Case) -> tuple[str, ...]:
    """Names of the thawed layers whose statistics stand in the first checkpoint."""
    return tuple(
        name
        for name in case.rows
        if all(key in case.reference.get(name, ()) for key in BUFFERS)
        and THAWED.is_shown_by(case, name)
    )


class _WholeModelCause(NamedTuple):
    """A cause in the data or in the model as a whole, not in single layers."""

    name: str
    why: str
    fix: str


_SHIFTED_DATA = _WholeModelCause(
    name="shifted test data",
    why="the norms use statistics of the training inputs, and those of the test inputs differ",
    fix="nk.recalibrate(model, test_inputs).apply() on inputs of the new kind, without labels; or "
    "nk.tune_example_weight(model, held_out), which mixes each example's own statistics in",
)
_ESTIMATION_SHIFT = _WholeModelCause(
    name="estimation shift",
    why="errors of the population statistics add up from norm to norm",
    fix="nk.tune_example_weight(model, held_out); or nk.place_xbn_(model), and train on",
)


def other_causes(scores: Mapping[str, Scores], shift: EstimationShift | None) -> Iterator[Cause]:
    """Name the causes that remain when all statistics are those of the training data."""
    known = [scores[name] for name in (AS_IT_IS, RECALIBRATED, RESTORED) if name in scores]
    best = min(known, key=lambda each: each.mean_loss)
    if ADAPTED in scores:
        gain = scores[ADAPTED].gain_over(best)
        yield from _cause(_SHIFTED_DATA, _describe_shift(shift), (), gain, scores)
        best = min(best, scores[ADAPTED], key=lambda each: each.mean_loss)
    if BY_BATCH in scores:
        gain = scores[BY_BATCH].gain_over(best)
        if gain.mean < BATCH_SHARE * abs(best.mean_loss):
            return
        what = (
            "each batch's own statistics give a smaller loss than the best statistics for all "
            f"data: {scores[BY_BATCH].mean_loss:.4g} against {best.mean_loss:.4g}"
        )
        yield from _cause(_ESTIMATION_SHIFT, what, (), gain, scores)


def _describe_shift(shift: EstimationShift | None) -> str:
    found = "statistics of other test inputs fit better than those of the training data"
    first = shift.layers[0] if shift else None
    if first is None or first.esm_mean is None:
        return found
    return (
        f"{found}; the inputs themselves are {first.esm_mean:.3g} apart in their means and "
        f"{first.esm_std:.3g} in their standard deviations"
    )


def _cause(
    about: Symptom | _WholeModelCause,
    what: str,
    layers: tuple[str, ...],
    gain: Gain,
    scores: Mapping[str, Scores],
) -> Iterator[Cause]:
    """Yield a cause if its gain is certain and large enough."""
    if _is_large(gain, scores):
        loss = abs(scores[AS_IT_IS].mean_loss)
        yield Cause(
            name=about.name,
            what=what,
            why=about.why,
            fix=about.fix,
            layers=layers,
            explains=gain,
            share=gain.mean / loss if loss else 1.0,
        )
