"""The doctor: find out why an evaluation is bad, and which fix helps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normkit.advice import validate
from normkit.core.check import require_count
from normkit.diagnostics import (
    EstimationShift,
    channel_difference,
    disturb_statistics,
    estimation_shift,
    inactive_channels,
)
from normkit.diagnostics.measurement import Measurement
from normkit.doctor import causes
from normkit.doctor.causes import ADAPTED, AS_IT_IS, BY_BATCH, RECALIBRATED, RESTORED, thawed
from normkit.doctor.detectors import OWN_LOSSES, are_of_detectors, losses_of_pictures
from normkit.doctor.diagnosis import (
    AtCheckpoint,
    Diagnosis,
    LayerReport,
    Sensitivity,
    State,
)
from normkit.doctor.judge import Halves, Judge, Scores, at_evaluation, temporary_statistics
from normkit.doctor.pixels import PIXELS_LOSS, are_of_segmenters
from normkit.doctor.states import Patient, Rows, is_dropout, new_values, rows_of, with_dropout
from normkit.doctor.symptoms import STATISTICS, Case, has_small_last_batch
from normkit.doctor.trials import try_all
from normkit.errors import DataError, NormError, OptionError
from normkit.inference.tracked import tracked
from normkit.passes import (
    Forward,
    Snapshot,
    as_list,
    call_with_cleanup,
    changes_nothing,
    forward_batch,
    num_examples,
    progress,
    require_unwrapped,
)
from normkit.tune.metrics import Score, read_metric

MIN_EXAMPLES = 4  # in each half of the test data
DELTAS = (0.1, 0.3)  # largest relative errors of disturbed statistics
NUM_SEEDS = 3  # random draws for each delta

Measured = TypeVar("Measured", bound=Measurement)


@changes_nothing
def diagnose(  # noqa: PLR0913 - a model, its data, and facts that only the user knows
    model: nn.Module,
    train_batches: Iterable[Any],
    test_batches: Iterable[Any],
    *,
    loss: Score | None = None,
    batch_size: int | None = None,
    checkpoints: Mapping[str, Mapping[str, Tensor]] | None = None,
    try_fixes: bool = False,
    forward: Forward | None = None,
) -> Diagnosis:
    r"""Find out why a model evaluates badly, by how much, and which fix helps.

    The doctor takes the test loss four times: with the model's running statistics, with statistics
    of the training data, with statistics of other test inputs, and with each batch's own
    statistics. It measures how much smaller each makes the loss, with a 95 % interval over paired
    examples, and finds the cause from the symptoms of the layers. A cause explains at least a
    twentieth of the loss. A method that uses test inputs runs twice: on the batches at even places
    and on those at odd places; each time the other batches judge it. The model is left as it was.

    Args:
        model: A trained model with norms of torch or normkit.
        train_batches: Training data as the training saw it, a smaller last batch included; read
            once and kept.
        test_batches: Test data with targets, two batches or more; read once and kept.
        loss: ``loss(output, batch)`` gives one value for each example; smaller is better. The
            default is the cross entropy of pairs ``(inputs, target)``; for maps of classes
            ``(N, H, W)`` its mean over a picture's pixels, but those of class 255; and for lists of
            pictures and targets, as detectors take them, the sum of the model's own losses.
        batch_size: Examples of a batch in training. The default is the median size of the train
            batches.
        checkpoints: Earlier state dicts of this model by name, the oldest first.
        try_fixes: Try fixes on copies of the model, and measure the gain of each.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.

    Returns:
        The causes with their share of the loss and their fixes, the layers and the trials. It
        prints as text, and has ``to_json``, ``table`` and ``plot``.

    Raises:
        OptionError: If the model is compiled or wrapped, or the batch size is no positive integer.
        DataError: If there is no training batch, there are fewer than two test batches or fewer
            than 8 test examples, a target is no class, a batch needs ``forward`` or
            ``batch_size``, or a checkpoint does not fit the model.

    Source:
        Huang et al., Delving into the Estimation Shift of Batch Normalization in a Network, for
        the estimation shift; Qiao et al., Micro-Batch Training with Batch-Channel Normalization
        and Weight Standardization, for differences between channels and inactive channels.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(),
        ...                       nn.Linear(216, 5))
        >>> data = [(9 + torch.randn(16, 3, 8, 8), torch.randint(5, (16,))) for _ in range(8)]
        >>> diagnose(model, data, data).causes[0].name
        'statistics never set'
    """
    require_unwrapped(model, "diagnose")
    patient = _admit(model, train_batches, test_batches, loss, batch_size, checkpoints, forward)
    notes = list[str]()
    case, scores = _examine(patient, notes)
    found = causes.find_wrong_statistics(patient, case, scores)
    shift = _measure(estimation_shift, patient, notes, train_batches=patient.train)
    recalibrated = None if shift is None else _recalibrated_shift(patient, case)
    all_causes = [*found.causes, *causes.other_causes(scores, shift)]
    before = scores[AS_IT_IS]
    return Diagnosis(
        num_train=sum(case.sizes),
        num_judged=len(before.loss),
        batch_size=patient.batch_size,
        states=tuple(_state(name, each, before) for name, each in scores.items()),
        causes=tuple(sorted(all_causes, key=lambda cause: -cause.explains.mean)),
        layers=tuple(_layers(case, found, shift, recalibrated)),
        shift=shift,
        over_training=tuple(_over_training(patient, shift)),
        sensitivity=tuple(_sensitivity(patient)),
        channel_difference=_measure(channel_difference, patient, notes),
        inactive_channels=_measure(inactive_channels, patient, notes),
        findings=tuple(_findings(patient, notes)),
        trials=tuple(try_all(patient, case, before)) if try_fixes else (),
        notes=tuple(notes),
    )


def _admit(  # noqa: PLR0913 - the arguments of diagnose
    model: nn.Module,
    train_batches: Iterable[Any],
    test_batches: Iterable[Any],
    loss: Score | None,
    batch_size: int | None,
    checkpoints: Mapping[str, Mapping[str, Tensor]] | None,
    forward: Forward | None,
) -> Patient:
    """Check all arguments before anything runs."""
    train, test = as_list(train_batches, "train_batches"), as_list(test_batches, "test_batches")
    halves = test[::2], test[1::2]
    _require_examples(halves)
    return Patient(
        model=model,
        train=train,
        judge=_judge(halves, loss, forward),
        forward=forward or forward_batch,
        batch_size=require_count("batch_size", _usual_size(train, batch_size)),
        checkpoints=_require_fitting(model, checkpoints or {}),
    )


def _judge(halves: Halves, loss: Score | None, forward: Forward | None) -> Judge:
    if loss is None and forward is None and are_of_detectors(halves[0]):
        return Judge(halves, OWN_LOSSES, losses_of_pictures, is_single=True)
    if loss is None and are_of_segmenters(halves[0]):
        return Judge(halves, PIXELS_LOSS, forward or forward_batch)
    metric = read_metric("loss" if loss is None else loss, larger_is_better=False)
    return Judge(halves, metric, forward or forward_batch)


def _require_examples(halves: Halves) -> None:
    sizes = [sum(_sizes(half)) for half in halves]
    if min(sizes) < MIN_EXAMPLES and None not in map(num_examples, [*halves[0], *halves[1]]):
        raise DataError(
            f"the test batches at even and at odd places have {sizes[0]} and {sizes[1]} examples; "
            f"give two batches or more, with {MIN_EXAMPLES} examples or more each: one half judges "
            f"what was measured on the other"
        )


def _usual_size(batches: Sequence[Any], given: int | None) -> int:
    if given is not None:
        return given
    sizes = _sizes(batches)
    if not any(sizes):
        raise DataError("train_batches= has no tensors to count examples by; pass batch_size=")
    return round(median(sizes))


def _sizes(batches: Sequence[Any]) -> list[int]:
    """Count the examples of each batch; 0 if a batch has no tensor to count them by."""
    return [num_examples(batch) or 0 for batch in batches]


def _require_fitting(
    model: nn.Module, checkpoints: Mapping[str, Mapping[str, Tensor]]
) -> Mapping[str, Mapping[str, Tensor]]:
    for name, state in checkpoints.items():
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise DataError(
                f"checkpoint {name!r} holds other things than tensors; give the state dict itself"
            )
        # Old checkpoints may lack the counts of batches (``num_batches_tracked``).
        other = [
            key
            for key in {*shapes, *state}
            if not key.endswith(STATISTICS[-1])
            and (key not in state or shapes.get(key) != state[key].shape)
        ]
        if other:
            raise DataError(
                f"checkpoint {name!r} is of another model: {', '.join(sorted(other)[:4])} differ; "
                f"give state dicts of this one"
            )
    return checkpoints


def _examine(patient: Patient, notes: list[str]) -> tuple[Case, dict[str, Scores]]:
    """Measure the statistics of all data, and score the model with each kind of statistics."""
    model, sizes = patient.model, tuple(_sizes(patient.train))
    rows = _measure_population(patient, notes)
    case = Case(
        model=model,
        rows=rows,
        dropped=_measure_with_dropout(patient) if rows else {},
        last=_measure_last_batch(patient) if rows and has_small_last_batch(sizes) else {},
        sizes=sizes,
        batch_size=patient.batch_size,
        reference=_reference(patient),
    )
    scores = {AS_IT_IS: patient.as_it_is()}
    if not rows:
        return case, scores
    scores[RECALIBRATED] = patient.with_statistics(new_values(rows), "judging new statistics")
    names = thawed(case)
    if names:
        values = {name: case.reference[name] for name in names}
        scores[RESTORED] = patient.with_statistics(values, "judging old statistics")
    try:
        scores[ADAPTED] = patient.adapted()
    except DataError as error:
        notes.append(f"statistics of the test inputs: {error}")
    by_batch = patient.by_batch()
    if isinstance(by_batch, str):
        notes.append(f"each test batch's own statistics: {by_batch}")
    else:
        scores[BY_BATCH] = by_batch
    notes.extend(_broken(scores))
    return case, scores


def _measure_population(patient: Patient, notes: list[str]) -> Rows:
    """Measure the training data's statistics, and note which layers cannot be measured."""
    if not tracked(patient.model):
        return {}
    patch = patient.measure(patient.train)
    notes.extend(f"layer {left.name or 'itself'} ({left.kind}): {left.why}" for left in patch.left)
    return rows_of(patch)


def _measure_with_dropout(patient: Patient) -> Rows:
    """Measure with dropout active and a fixed seed; empty if the model has no dropout."""
    if not any(map(is_dropout, patient.model.modules())):
        return {}

    def measured() -> Rows:
        torch.manual_seed(0)
        return rows_of(patient.measure(patient.train, with_dropout(patient.forward)))

    # The snapshot restores the random state that the seed changed.
    return call_with_cleanup(measured, Snapshot(patient.model).put_back)


def _broken(scores: Mapping[str, Scores]) -> Iterator[str]:
    for name, each in scores.items():
        if each.num_broken:
            yield (
                f"{each.num_broken} of {len(each.loss)} losses {name}: they are not finite, and "
                f"each counts as {each.loss.max().item():.4g}"
            )


def _measure_last_batch(patient: Patient) -> Rows:
    """Measure the last training batch; empty if a layer has one value in it, so no variance."""
    try:
        return rows_of(patient.measure(patient.train[-1:]))
    except DataError:
        return {}


def _reference(patient: Patient) -> dict[str, dict[str, Tensor]]:
    """Read the statistics and parameters of each tracking layer in the first checkpoint."""
    first = next(iter(patient.checkpoints.values()), {})
    found = {}
    for name in tracked(patient.model):
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): v for key, v in first.items() if key.startswith(prefix)}
        found[name] = {key: value for key, value in own.items() if "." not in key}
    return found


def _state(name: str, scores: Scores, before: Scores) -> State:
    return State(
        name=name, loss=scores.mean_loss, accuracy=scores.accuracy, gain=scores.gain_over(before)
    )


def _measure(
    measure: Callable[..., Measured],
    patient: Patient,
    notes: list[str],
    **options: Any,
) -> Measured | None:
    """Take a measure of ``normkit.diagnostics`` on the test data, or note why it is impossible."""
    try:
        return measure(patient.model, patient.test, forward=patient.forward, **options)
    except NormError as error:
        # Without a norm that pools channels there is no difference of channels to report.
        if measure is not channel_difference or not isinstance(error, OptionError):
            notes.append(f"{measure.__name__}: {error}")
        return None


def _recalibrated_shift(patient: Patient, case: Case) -> EstimationShift:
    with temporary_statistics(patient.model, new_values(case.rows)):
        return estimation_shift(patient.model, patient.test, forward=patient.forward)


def _layers(
    case: Case,
    found: causes.WrongStatistics,
    shift: EstimationShift | None,
    recalibrated: EstimationShift | None,
) -> Iterator[LayerReport]:
    after = {row.name: row for row in recalibrated.layers} if recalibrated else {}
    for each in shift.layers[1:] if shift else ():
        row = case.rows.get(each.name)
        low, high = (None, None) if row is None else row.std_ratio
        yield LayerReport(
            name=each.name,
            kind=type(case.layer(each.name)).__name__,
            mean_shift=None if row is None else row.mean_shift,
            std_low=low,
            std_high=high,
            esm_mean=each.esm_mean,
            esm_std=each.esm_std,
            esm_std_recalibrated=after[each.name].esm_std if each.name in after else None,
            returns=found.returns.get(each.name),
            cause=found.symptoms.get(each.name),
        )


def _over_training(patient: Patient, now: EstimationShift | None) -> Iterator[AtCheckpoint]:
    if now is None or not patient.checkpoints:
        return
    with at_evaluation(patient.model):
        model = copy.deepcopy(patient.model)
    states = patient.checkpoints.items()
    for name, state in progress(states, "measuring checkpoints", len(states)):
        # Old checkpoints may lack the counts of batches.
        model.load_state_dict(dict(state), strict=False)
        shift = estimation_shift(model, patient.test, forward=patient.forward)
        yield AtCheckpoint(name=name, shift=shift)
    yield AtCheckpoint(name="now", shift=now)


def _sensitivity(patient: Patient) -> Iterator[Sensitivity]:
    if not tracked(patient.model):
        return
    for delta in DELTAS:
        losses = list[float]()
        for seed in range(NUM_SEEDS):
            with (
                at_evaluation(patient.model),
                disturb_statistics(patient.model, delta, seed=seed),
            ):
                scores = patient.judge.scores(patient.model, f"disturbing statistics by {delta:g}")
            losses.append(scores.mean_loss)
        yield Sensitivity(
            delta=delta, num_seeds=NUM_SEEDS, loss=fmean(losses), spread=stdev(losses)
        )


def _findings(patient: Patient, notes: list[str]) -> Iterator[str]:
    example = patient.example()
    try:
        if example is None:
            raise DataError(
                "the model's arguments are unknown, because forward= calls the model; call "
                "nk.validate(model, example_input=...) yourself"
            )
        found = validate(patient.model, batch_size=patient.batch_size, example_input=example)
    except NormError as error:
        notes.append(f"validate: {error}")
        return
    for each in found:
        if each.severity != "note":
            yield f"{each.severity}: {each.check}: {each.name or 'the model itself'}: {each.what}"
