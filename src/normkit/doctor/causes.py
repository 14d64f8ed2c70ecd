"""Which causes explain how much of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from normkit.diagnostics import EstimationShift
from normkit.doctor.diagnosis import SMALLEST_SHARE, Cause
from normkit.doctor.judge import Scores, Values
from normkit.doctor.signs import BUFFERS, SIGNS, THAWED, Case, Sign, is_near, sort_by_sign
from normkit.doctor.states import Patient
from normkit.tune.gain import Gain

BATCH_SHARE = 0.5
"""Of what is left: examples of a batch tell about each other, so that less is no fault."""
AS_IT_IS = "as the model is"
RECALIBRATED = "measured anew on the training data"
RESTORED = "of the first checkpoint"
ADAPTED = "measured anew on other test inputs"
BY_BATCH = "of each test batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What was found of running statistics.

    Args:
        causes: Causes of wrong statistics.
        layers: The sign of each layer by its name; empty where new statistics gain nothing.
        returns: Loss that comes back with each layer's old statistics.
    """

    causes: tuple[Cause, ...] = ()
    layers: Mapping[str, str]
    returns: Mapping[str, float]


def wrong_statistics(patient: Patient, case: Case, scores: Mapping[str, Scores]) -> Statistics:
    """Find out which layers' statistics cost how much, and by which sign they are known."""
    causes = list(_restored(case, scores))
    if not _matters(scores, RECALIBRATED):
        return Statistics(causes=tuple(causes), layers={}, returns={})
    healed = scores[RECALIBRATED]
    alone = {name: _with_old(patient, case, (name,), name) for name in case.rows}
    returns = {name: healed.gain_over(old).mean for name, old in alone.items()}
    costly = SMALLEST_SHARE * healed.gain_over(scores[AS_IT_IS]).mean
    wrong = [name for name in case.rows if returns[name] >= costly or not is_near(case, name)]
    groups = sort_by_sign(case, wrong)
    for sign in SIGNS:
        layers = groups.get(sign.name, ())
        if layers and sign.name not in {cause.name for cause in causes}:
            whole = healed.gain_over(scores[AS_IT_IS])
            gain = whole if len(groups) == 1 else _explained(patient, case, layers, scores)
            causes += _cause(sign, sign.what(case, layers), layers, gain, scores)
    return Statistics(
        causes=tuple(causes),
        layers={name: sign for sign, layers in groups.items() for name in layers},
        returns=returns,
    )


def _explained(
    patient: Patient, case: Case, layers: Sequence[str], scores: Mapping[str, Scores]
) -> Gain:
    """Loss that comes back with some layers' old statistics, at most what all new ones gain.

    Old statistics among new ones can be worse than all old ones together.
    """
    healed = scores[RECALIBRATED]
    alone = healed.gain_over(_with_old(patient, case, layers, "these layers"))
    return min(alone, healed.gain_over(scores[AS_IT_IS]), key=lambda gain: gain.mean)


def _matters(scores: Mapping[str, Scores], state: str) -> bool:
    return state in scores and _counts(scores[state].gain_over(scores[AS_IT_IS]), scores)


def _counts(gain: Gain, scores: Mapping[str, Scores]) -> bool:
    loss = abs(scores[AS_IT_IS].mean_loss)
    return gain.significant and gain.mean >= SMALLEST_SHARE * loss


def _with_old(patient: Patient, case: Case, names: Sequence[str], what: str) -> Scores:
    """Score the model with old statistics in some layers and new ones in all others."""
    values: Values = {
        name: row.old if name in names else row.new for name, row in case.rows.items()
    }
    return patient.with_statistics(values, f"judging {what}")


def _restored(case: Case, scores: Mapping[str, Scores]) -> Iterator[Cause]:
    """Layers that were thawed, if the first checkpoint's statistics are better than new ones."""
    if RESTORED not in scores:
        return
    restored, anew = scores[RESTORED], scores[RECALIBRATED]
    if restored.mean_loss < anew.mean_loss:
        layers, gain = thawed(case), restored.gain_over(scores[AS_IT_IS])
        yield from _cause(THAWED, THAWED.what(case, layers), layers, gain, scores)


def thawed(case: Case) -> tuple[str, ...]:
    """Layers that were thawed and whose statistics the first checkpoint has."""
    known = (name for name in case.rows if all(k in case.reference.get(name, ()) for k in BUFFERS))
    return tuple(name for name in known if THAWED.shows(case, name))


class _Reason(NamedTuple):
    """A cause that lies in the data or the model as a whole."""

    name: str
    why: str
    fix: str


_SHIFTED = _Reason(
    name="shifted test data",
    why="the test inputs have other statistics than the training inputs, on which the norms rely",
    fix="nk.recalibrate(model, test_inputs).apply() on inputs of the new kind, without labels; or "
    "nk.tune_example_weight(model, held_out), which gives each example a part in its statistics",
)
_ESTIMATION = _Reason(
    name="estimation shift",
    why="errors of population statistics add up from norm to norm",
    fix="nk.tune_example_weight(model, held_out); or nk.place_xbn_(model), and train on",
)


def other_causes(scores: Mapping[str, Scores], shift: EstimationShift | None) -> Iterator[Cause]:
    """What is left when the statistics are those of the training data."""
    known = [scores[name] for name in (AS_IT_IS, RECALIBRATED, RESTORED) if name in scores]
    best = min(known, key=lambda each: each.mean_loss)
    if ADAPTED in scores:
        gain = scores[ADAPTED].gain_over(best)
        yield from _cause(_SHIFTED, _distance(shift), (), gain, scores)
        best = min(best, scores[ADAPTED], key=lambda each: each.mean_loss)
    if BY_BATCH in scores:
        gain = scores[BY_BATCH].gain_over(best)
        if gain.mean < BATCH_SHARE * abs(best.mean_loss):
            return
        what = (
            "each batch's own statistics are better than the best for all of the data: loss "
            f"{scores[BY_BATCH].mean_loss:.4g} against {best.mean_loss:.4g}"
        )
        yield from _cause(_ESTIMATION, what, (), gain, scores)


def _distance(shift: EstimationShift | None) -> str:
    found = "statistics of other test inputs fit better than those of the training data"
    first = shift.layers[0] if shift else None
    if first is None or first.esm_mean is None:
        return found
    return (
        f"{found}; the inputs themselves are {first.esm_mean:.3g} apart in their means and "
        f"{first.esm_std:.3g} in their standard deviations"
    )


def _cause(
    about: Sign | _Reason,
    what: str,
    layers: tuple[str, ...],
    gain: Gain,
    scores: Mapping[str, Scores],
) -> Iterator[Cause]:
    """Name a cause if it explains enough."""
    if _counts(gain, scores):
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
