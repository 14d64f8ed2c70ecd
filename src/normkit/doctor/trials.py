"""Fixes, tried on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.advice import recommend
from normkit.advice.situation import count_examples
from normkit.convert import convert_norm_, place_xbn_
from normkit.doctor.causes import RESTORED, thawed
from normkit.doctor.diagnosis import Trial
from normkit.doctor.judge import Scores, at_evaluation, write
from normkit.doctor.signs import Case
from normkit.doctor.states import Patient
from normkit.errors import NormError
from normkit.inference import recalibrate
from normkit.tune import tune_example_weight
from normkit.tune.metrics import KNOWN

CALIBRATED_ON = 1024
"""Training examples, at most, that calibrate a conversion: it takes half a forward a layer."""
UNTRAINED = "before any training on; layers changed: {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fix:
    """Something to try.

    Args:
        name: What it is called.
        call: The call that does it.
        do: ``do(copy, looked_at)`` changes a copy of the model, and says what to know about it.
        looks: Whether it looks at test batches: then those of one half, to be judged by the other.
    """

    name: str
    call: str
    do: Callable[[nn.Module, Sequence[Any]], str]
    looks: bool = False


def try_all(patient: Patient, case: Case, before: Scores) -> Iterator[Trial]:
    """Try every fix on a copy of its own; what cannot be done says why."""
    for fix in _fixes(patient, case):
        yield _tried(fix, patient, before)


def _tried(fix: _Fix, patient: Patient, before: Scores) -> Trial:
    try:
        after, note = _after(fix, patient)
    except NormError as error:
        return Trial(
            name=fix.name, call=fix.call, loss=None, accuracy=None, gain=None, note=_short(error)
        )
    return Trial(
        name=fix.name,
        call=fix.call,
        loss=after.mean_loss,
        accuracy=after.accuracy,
        gain=after.gain_over(before),
        note=note,
    )


def _after(fix: _Fix, patient: Patient) -> tuple[Scores, str]:
    """Scores after a fix, and what to know about it."""
    if not fix.looks:
        return _fixed(fix, patient, (), None)
    first, second = patient.judge.halves
    scores, note = _fixed(fix, patient, second, 0)
    others, other_note = _fixed(fix, patient, first, 1)
    return scores.then(others), note if note == other_note else f"{note}; {other_note}"


def _fixed(
    fix: _Fix, patient: Patient, looked_at: Sequence[Any], half: int | None
) -> tuple[Scores, str]:
    with at_evaluation(patient.model):
        model = copy.deepcopy(patient.model)
    note = fix.do(model, looked_at)
    with at_evaluation(model):
        return patient.judge.scores(model, f"trying: {fix.name}", half), note


def _fixes(patient: Patient, case: Case) -> Iterator[_Fix]:
    if thawed(case):
        yield _restore(case)
    if case.rows:
        yield _recalibrate(patient)
        yield _adapt(patient)
        yield _weigh(patient)
        yield _place(patient)
    yield _convert(patient)


def _restore(case: Case) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        write(model, {name: case.reference[name] for name in thawed(case)})
        return "then freeze them"

    return _Fix(
        name=f"statistics {RESTORED}",
        call="model.load_state_dict(first); nk.freeze_statistics(model)",
        do=do,
    )


def _recalibrate(patient: Patient) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _patch(model, patient)
        return ""

    return _Fix(name="recalibrate", call="nk.recalibrate(model, train_batches).apply()", do=do)


def _patch(model: nn.Module, patient: Patient) -> None:
    rows = patient.measure(patient.train)
    write(model, {name: row.new for name, row in rows.items()})


def _adapt(patient: Patient) -> _Fix:
    def do(model: nn.Module, looked_at: Sequence[Any]) -> str:
        recalibrate(model, looked_at, forward=patient.forward).apply()
        return "by each half of the test inputs for the other, without labels"

    return _Fix(
        name="recalibrate on test inputs",
        call="nk.recalibrate(model, test_inputs).apply()",
        do=do,
        looks=True,
    )


def _weigh(patient: Patient) -> _Fix:
    def do(model: nn.Module, looked_at: Sequence[Any]) -> str:
        _patch(model, patient)
        metric = patient.judge.metric
        found = tune_example_weight(
            model,
            looked_at,
            metric="loss" if metric is KNOWN["loss"] else metric.score,
            forward=patient.forward,
            larger_is_better=False,
        )
        return f"alpha {found.alpha:.3g}"

    return _Fix(
        name="recalibrate, then weigh examples",
        call="nk.recalibrate(model, train_batches).apply(); "
        "nk.tune_example_weight(model, held_out)",
        do=do,
        looks=True,
    )


def _place(patient: Patient) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _patch(model, patient)
        planned = place_xbn_(model, dry_run=True).changes
        specs = {change.name: change.new for change in planned}
        return _converted(model, specs, patient)

    return _Fix(
        name="recalibrate, then XBN blocks, calibrated",
        call="changes = nk.place_xbn_(model, dry_run=True).changes; nk.convert_norm_(model, "
        "{change.name: change.new for change in changes}, calibrate=train_batches)",
        do=do,
    )


def _convert(patient: Patient) -> _Fix:
    options = [str(each.spec) for each in recommend(patient.batch_size)]
    spec = next(each for each in options if each.partition(":")[0].partition("+")[0] != "bn")

    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _patch(model, patient)
        return _converted(model, spec, patient)

    return _Fix(
        name=f"recalibrate, then {spec}, calibrated",
        call=f'nk.convert_norm_(model, "{spec}", calibrate=train_batches)',
        do=do,
    )


def _converted(model: nn.Module, specs: str | dict[str, str], patient: Patient) -> str:
    done = convert_norm_(
        model,
        specs,
        calibrate=_first(patient.train, CALIBRATED_ON),
        forward=patient.forward,
        batch_size=patient.batch_size,
        example_input=patient.example(),
    )
    names = [change.name for change in done.changes]
    return UNTRAINED.format(", ".join(names[:4]) + (", ..." if len(names) > 4 else ""))


def _first(batches: Sequence[Any], at_most: int) -> Sequence[Any]:
    """As many of the batches as hold so many examples, one at least."""
    total = 0
    for place, batch in enumerate(batches):
        total += count_examples(batch)
        if total > at_most:
            return batches[: max(place, 1)]
    return batches


def _short(error: Exception, at_most: int = 120) -> str:
    text = " ".join(str(error).split())
    return f"cannot be done: {text if len(text) <= at_most else text[:at_most] + '...'}"
