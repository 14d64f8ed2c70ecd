"""Try fixes on copies of the model, and measure the gain of each one."""

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
from normkit.doctor.states import Patient, new_values, rows_of
from normkit.doctor.symptoms import FROZEN, Case
from normkit.errors import NormError
from normkit.passes import num_examples
from normkit.text import listed, shortened
from normkit.tune import tune_example_weight
from normkit.tune.metrics import KNOWN
from normkit.tune.result import shown

MAX_CALIBRATION = 1024
"""Training examples, at most, that calibrate a conversion, which costs half a forward a layer."""
CALIBRATE = "calibrate=train_batches[:n]"
MAX_ERROR_LENGTH = 120  # characters of an error in a note
UNTRAINED = "not trained further yet; layers changed: {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fix:
    """A fix to try.

    Args:
        name: Its name.
        call: The call that a user makes for it.
        do: ``do(copy, test_half)`` changes a copy of the model, and returns a note on the result.
        uses_test_data: Whether it needs test batches. It then gets those of one half, and the
            other half judges the result.
    """

    name: str
    call: str
    do: Callable[[nn.Module, Sequence[Any]], str]
    uses_test_data: bool = False


def try_all(patient: Patient, case: Case, before: Scores) -> Iterator[Trial]:
    """Try every fix on a copy of its own; the note of an impossible fix says why it is so."""
    for fix in _fixes(patient, case):
        yield _tried(fix, patient, before)


def _tried(fix: _Fix, patient: Patient, before: Scores) -> Trial:
    after = None
    try:
        after, note = _after(fix, patient)
    except NormError as error:
        note = f"cannot be done: {shortened(error, MAX_ERROR_LENGTH)}"
    return Trial(
        name=fix.name,
        call=fix.call,
        loss=after and after.mean_loss,
        accuracy=after and after.accuracy,
        gain=after and after.gain_over(before),
        note=note,
    )


def _after(fix: _Fix, patient: Patient) -> tuple[Scores, str]:
    """Scores after a fix, and its note."""
    if not fix.uses_test_data:
        return _try_once(fix, patient, (), None)
    first, second = patient.judge.halves
    scores, note = _try_once(fix, patient, second, 0)
    others, other_note = _try_once(fix, patient, first, 1)
    return scores.then(others), note if note == other_note else f"{note}; {other_note}"


def _try_once(
    fix: _Fix, patient: Patient, test_half: Sequence[Any], half: int | None
) -> tuple[Scores, str]:
    """Apply a fix to a copy; ``half`` of the test data judges it, or all data if that is None."""
    with at_evaluation(patient.model):
        model = copy.deepcopy(patient.model)
    note = fix.do(model, test_half)
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
        return f"in the {len(thawed(case))} thawed layers"

    return _Fix(
        name=f"statistics {RESTORED}",
        call="model.load_state_dict({k: v for k, v in first.items() if 'running' in k and "
        "k.rpartition('.')[0] in thawed}, strict=False); "
        "nk.freeze_statistics(model, lambda _, name: name in thawed)",
        do=do,
    )


def _recalibrate(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _write_measured(model, case)
        return ""

    call = _recalibrate_call("train_batches", patient, case)
    return _Fix(name="recalibrate", call=call, do=do)


def _recalibrate_call(batches: str, patient: Patient, case: Case) -> str:
    """The calls that measure statistics as this trial did."""
    order = ", sequential=True" if patient.in_order else ""
    call = f"nk.recalibrate(model, {batches}{order}).apply()"
    frozen = any(FROZEN.is_shown_by(case, name) for name in case.rows)
    return f"nk.thaw_statistics(model); {call}; nk.freeze_statistics(model)" if frozen else call


def _write_measured(model: nn.Module, case: Case) -> None:
    """Write the training data's statistics into a copy of the model."""
    write(model, new_values(case.rows))


def _adapt(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, test_half: Sequence[Any]) -> str:
        write(model, new_values(rows_of(patient.measure(test_half))))
        return "measured on one half of the test inputs, judged on the other, without labels"

    return _Fix(
        name="recalibrate on test inputs",
        call=_recalibrate_call("test_inputs", patient, case),
        do=do,
        uses_test_data=True,
    )


def _weigh(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, test_half: Sequence[Any]) -> str:
        _write_measured(model, case)
        metric = patient.judge.metric
        found = tune_example_weight(
            model,
            test_half,
            metric="loss" if metric is KNOWN["loss"] else metric.score,
            forward=patient.judge.forward,
            larger_is_better=False,
        )
        return f"alpha {shown(found.alpha)}"

    call = _recalibrate_call("train_batches", patient, case)
    return _Fix(
        name="recalibrate, then weigh examples",
        call=f"{call}; nk.tune_example_weight(model, held_out)",
        do=do,
        uses_test_data=True,
    )


def _place(patient: Patient, case: Case) -> _Fix:
    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _write_measured(model, case)
        planned = place_xbn_(model, dry_run=True).changes
        specs = {change.name: change.new for change in planned}
        return _converted(model, specs, patient)

    return _Fix(
        name="recalibrate, then XBN blocks, calibrated",
        call=f"{_recalibrate_call('train_batches', patient, case)}; "
        "changes = nk.place_xbn_(model, dry_run=True).changes; nk.convert_norm_(model, "
        f"{{change.name: change.new for change in changes}}, {CALIBRATE})",
        do=do,
    )


def _convert(patient: Patient, case: Case) -> _Fix:
    options = [str(each.spec) for each in recommend(patient.batch_size)]
    spec = next(each for each in options if each.partition(":")[0].partition("+")[0] != "bn")

    def do(model: nn.Module, _: Sequence[Any]) -> str:
        _write_measured(model, case)
        return _converted(model, spec, patient)

    call = f'nk.convert_norm_(model, "{spec}", {CALIBRATE})'
    if not case.rows:
        return _Fix(name=f"{spec}, calibrated", call=call, do=do)
    return _Fix(
        name=f"recalibrate, then {spec}, calibrated",
        call=f"{_recalibrate_call('train_batches', patient, case)}; {call}",
        do=do,
    )


def _converted(model: nn.Module, specs: str | dict[str, str], patient: Patient) -> str:
    done = convert_norm_(
        model,
        specs,
        calibrate=_first_batches(patient.train, MAX_CALIBRATION),
        forward=patient.forward,
        batch_size=patient.batch_size,
        example_input=patient.example(),
    )
    return UNTRAINED.format(listed((change.name for change in done.changes), 4))


def _first_batches(batches: Sequence[Any], at_most: int) -> Sequence[Any]:
    """The first batches that together hold at most so many examples, but at least one batch."""
    total = 0
    for place, batch in enumerate(batches):
        total += num_examples(batch) or 1
        if total > at_most:
            return batches[: max(place, 1)]
    return batches
