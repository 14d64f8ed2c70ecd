"""Fixes, tried on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.advice import recommend
from normkit.convert import convert_norm_, place_xbn_
from normkit.doctor.causes import RESTORED, thawed
from normkit.doctor.diagnosis import Trial
from normkit.doctor.judge import Scores, at_evaluation, write
from normkit.doctor.signs import FROZEN, Case
from normkit.doctor.states import Patient, new_values, rows_of
from normkit.errors import NormError
from normkit.passes import num_examples
from normkit.text import shortened
from normkit.tune import tune_example_weight
from normkit.tune.metrics import KNOWN
from normkit.tune.result import shown

CALIBRATED_ON = 1024
"""Training examples, at most, that calibrate a conversion: it takes half a forward a layer."""
CALIBRATE = "calibrate=train_batches[:n]"
SHOWN = 120  # characters of an error
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
            name=fix.name,
            call=fix.call,
            loss=None,
            accuracy=None,
            gain=None,
            note=f"cannot be done: {shortened(error, SHOWN)}",
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
        yield _recalibrate(patient, case)
        yield _adapt(patient, case)
        yield _weigh(patient, case)
        yield _place(patient, case)
    yield _convert(patient, case)


def _restore(case: Case) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        write(model, {name: case.reference[name] for name in thawed(case)})
        return f"in the {len(thawed(case))} layers that have thawed"

    return _Fix(
        name=f"statistics {RESTORED}",
        call="model.load_state_dict({k: v for k, v in first.items() if 'running' in k and "
        "k.rpartition('.')[0] in thawed}, strict=False); "
        "nk.freeze_statistics(model, lambda _, name: name in thawed)",
        do=do,
    )


def _recalibrate(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _settle(model, case)
        return ""

    return _Fix(name="recalibrate", call=_measured("train_batches", patient, case), do=do)


def _measured(batches: str, patient: Patient, case: Case) -> str:
    """The call that measures statistics, as it was done."""
    order = ", sequential=True" if patient.in_order else ""
    call = f"nk.recalibrate(model, {batches}{order}).apply()"
    frozen = any(FROZEN.shows(case, name) for name in case.rows)
    return f"nk.thaw_statistics(model); {call}; nk.freeze_statistics(model)" if frozen else call


def _settle(model: nn.Module, case: Case) -> None:
    """Give a copy the training data's statistics."""
    write(model, new_values(case.rows))


def _adapt(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, looked_at: Sequence[Any]) -> str:
        write(model, new_values(rows_of(patient.measure(looked_at))))
        return "by each half of the test inputs for the other, without labels"

    return _Fix(
        name="recalibrate on test inputs",
        call=_measured("test_inputs", patient, case),
        do=do,
        looks=True,
    )


def _weigh(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, looked_at: Sequence[Any]) -> str:
        _settle(model, case)
        metric = patient.judge.metric
        found = tune_example_weight(
            model,
            looked_at,
            metric="loss" if metric is KNOWN["loss"] else metric.score,
            forward=patient.forward,
            larger_is_better=False,
        )
        return f"alpha {shown(found.alpha)}"

    call = _measured("train_batches", patient, case)
    return _Fix(
        name="recalibrate, then weigh examples",
        call=f"{call}; nk.tune_example_weight(model, held_out)",
        do=do,
        looks=True,
    )


def _place(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _settle(model, case)
        planned = place_xbn_(model, dry_run=True).changes
        specs = {change.name: change.new for change in planned}
        return _converted(model, specs, patient)

    return _Fix(
        name="recalibrate, then XBN blocks, calibrated",
        call=f"{_measured('train_batches', patient, case)}; "
        "changes = nk.place_xbn_(model, dry_run=True).changes; nk.convert_norm_(model, "
        f"{{change.name: change.new for change in changes}}, {CALIBRATE})",
        do=do,
    )


def _convert(patient: Patient, case: Case) -> _Fix:
    options = [str(each.spec) for each in recommend(patient.batch_size)]
    spec = next(each for each in options if each.partition(":")[0].partition("+")[0] != "bn")

    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _settle(model, case)
        return _converted(model, spec, patient)

    call = f'nk.convert_norm_(model, "{spec}", {CALIBRATE})'
    if not case.rows:
        return _Fix(name=f"{spec}, calibrated", call=call, do=do)
    return _Fix(
        name=f"recalibrate, then {spec}, calibrated",
        call=f"{_measured('train_batches', patient, case)}; {call}",
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
        total += num_examples(batch) or 1
        if total > at_most:
            return batches[: max(place, 1)]
    return batches
