"""Symptoms of wrong running statistics, each of which points to one cause.

A layer is sorted under the first symptom that it shows; one without any other is "stale".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from normkit.doctor.states import Rows, distance
from normkit.inference.freeze import is_frozen
from normkit.inference.tracked import STATISTICS, why_not_updated
from normkit.layers.base import BUFFERS

MEAN, VAR = BUFFERS
COUNT = STATISTICS[-1]
MIN_AVERAGED = 64.0
"""A running average over fewer examples than this changes much from batch to batch."""
SMALL_LAST_RATIO = 8
"""The last batch is small if the median batch is this many times larger.

It has the same weight in the running average as a full batch.
"""
NEAR_DISTANCE = 0.01
"""Squared distance of a tenth of a standard deviation.

Statistics that are nearer than this to the data's, and cost little, are not wrong.
"""
BETWEEN = 0.7
"""Running averages have stalled if this share of them lies between start and the data's value."""
STEP_TOLERANCE = 2.5
"""Two steps count as equally large if they differ by at most this factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that the symptoms are recognised by.

    Args:
        model: The model.
        rows: Each layer's old statistics, and new ones of the training data at evaluation.
        dropped: New statistics with dropout active; empty if the model has no dropout.
        last: New statistics of the last training batch alone; empty if that batch is not small.
        sizes: Examples of each training batch.
        batch_size: Examples of a usual training batch.
        reference: Statistics and parameters of each layer in the first checkpoint.
    """

    model: nn.Module
    rows: Rows
    dropped: Rows
    last: Rows
    sizes: tuple[int, ...]
    batch_size: int
    reference: Mapping[str, Mapping[str, Tensor]]

    def layer(self, name: str) -> nn.Module:
        """The layer of this name."""
        return self.model.get_submodule(name)

    def momentum(self, name: str) -> float | None:
        """Weight of a new batch in a layer's running statistics; None for a plain average."""
        return getattr(self.layer(name), "momentum", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """A symptom of wrong statistics, and the cause that it points to.

    Args:
        name: Name of the cause.
        is_shown_by: ``is_shown_by(case, layer)`` says whether a layer has the symptom.
        what: ``what(case, layers)`` says what was found in these layers, with numbers.
        why: Why that makes the evaluation worse.
        fix: The calls that mend it.
    """

    name: str
    is_shown_by: Callable[[Case, str], bool]
    what: Callable[[Case, tuple[str, ...]], str]
    why: str
    fix: str


RECALIBRATE = "nk.recalibrate(model, train_batches).apply()"


def _is_not_valid(case: Case, name: str) -> bool:
    old = case.rows[name].old
    return not all(old[key].isfinite().all() for key in BUFFERS) or bool((old[VAR] < 0).any())


def _was_never_set(case: Case, name: str) -> bool:
    old = case.rows[name].old
    start = bool((old[MEAN] == 0).all() and (old[VAR] == 1).all())
    return start and int(old.get(COUNT, torch.zeros(()))) == 0


def _is_16_bit(case: Case, name: str) -> bool:
    """Whether all statistics are 16-bit numbers, and most stalled on the way to the data's."""
    row = case.rows[name]
    values = torch.cat([row.old[key].flatten() for key in BUFFERS])
    narrow = any(
        torch.equal(values.to(dtype).to(values.dtype), values)
        for dtype in (torch.bfloat16, torch.float16)
    )
    start = {MEAN: 0.0, VAR: 1.0}
    # 0 at the start, 1 at the data's value; 0 / 0 is NaN, which counts as not between the two.
    progress = [(row.old[key] - start[key]) / (row.new[key] - start[key]) for key in BUFFERS]
    between = [((share >= 0) & (share <= 1)).double().mean().item() for share in progress]
    return narrow and sum(between) / 2 >= BETWEEN


def _is_frozen_or_stopped(case: Case, name: str) -> bool:
    layer = case.layer(name)
    kept_in_evaluation = case.model.training and not layer.training
    return (
        kept_in_evaluation
        or is_frozen(layer)
        or case.momentum(name) == 0
        or bool(why_not_updated(layer))
    )


def _is_thawed(case: Case, name: str) -> bool:
    """Whether statistics move on although weight and bias do not learn, or have not changed."""
    layer = case.layer(name)
    own = dict(layer.named_parameters(recurse=False))
    learns = any(parameter.requires_grad for parameter in case.model.parameters())
    fixed = learns and bool(own) and not any(p.requires_grad for p in own.values())
    return fixed or _has_moved_alone(case, name, own)


def _has_moved_alone(case: Case, name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether only the statistics, not weight and bias, differ from the first checkpoint's."""
    before, old = case.reference.get(name, {}), case.rows[name].old
    if not own or not all(key in before for key in (*own, *BUFFERS)):
        return False
    learned = any(not _equal(before[key], value) for key, value in own.items())
    return not learned and any(not _equal(before[key], old[key]) for key in BUFFERS)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu(), b.detach().cpu().to(a.dtype))


def _follows_dropout(case: Case, name: str) -> bool:
    """Whether the statistics are at least twice as near to those with dropout as without."""
    if name not in case.dropped:
        return False
    row = case.rows[name]
    with_drops = distance(row.old, case.dropped[name].new, row.eps)
    return 2 * with_drops < distance(row.old, row.new, row.eps)


def num_averaged(case: Case, name: str) -> float:
    r"""Effective number of examples in a running average, :math:`b (2 - m) / m`.

    A plain mean over so many examples has the same variance as the running average.
    """
    momentum = case.momentum(name)
    return torch.inf if not momentum else case.batch_size * (2 - momentum) / momentum


def _averages_few_examples(case: Case, name: str) -> bool:
    return num_averaged(case, name) < MIN_AVERAGED


def has_small_last_batch(sizes: tuple[int, ...]) -> bool:
    """Whether the last batch is much smaller than the others."""
    return len(sizes) > 1 and sizes[-1] * SMALL_LAST_RATIO <= median(sizes)


def _follows_last_batch(case: Case, name: str) -> bool:
    """Whether mean and variance are as far off as one update by the last batch moves them."""
    momentum = case.momentum(name)
    if name not in case.last or not momentum:
        return False
    steps = (_moved(case, name, key) for key in BUFFERS)
    return all(momentum / STEP_TOLERANCE <= step <= STEP_TOLERANCE * momentum for step in steps)


def _moved(case: Case, name: str, key: str) -> float:
    """How far the update moved a statistic: 0 at the population's, 1 at the last batch's value."""
    row, last = case.rows[name], case.last[name].new[key].double()
    old, new = (side[key].double() for side in (row.old, row.new))
    unit = row.new[VAR].double() + row.eps
    unit = unit.sqrt() if key == MEAN else unit
    away = ((last - new) / unit).norm().item()
    return ((old - new) / unit).norm().item() / away if away else 0.0


def _count(names: tuple[str, ...]) -> str:
    return f"{len(names)} {'layer' if len(names) == 1 else 'layers'}"


def _averages(case: Case, names: tuple[str, ...]) -> str:
    fewest = min(names, key=lambda name: num_averaged(case, name))
    return (
        f"momentum {case.momentum(fewest):g} and batches of {case.batch_size} make running "
        f"averages of {num_averaged(case, fewest):.2g} examples in {_count(names)}"
    )


def _narrow(case: Case, names: tuple[str, ...]) -> str:
    held = sum(case.rows[name].old[MEAN].dtype.itemsize < 4 for name in names)
    if held:
        return f"running statistics of {_count(names)} are kept in 16 bits and lag behind the data"
    # The state may have gone through a 16-bit checkpoint before it was loaded.
    return (
        f"all running statistics of {_count(names)} are 16-bit numbers, kept in wider buffers, "
        f"and lag behind the data"
    )


def _last_batch(case: Case, names: tuple[str, ...]) -> str:
    moved = median(_moved(case, name, MEAN) for name in names)
    return (
        f"the last training batch has {case.sizes[-1]} examples, a usual one "
        f"{case.batch_size}; the running means of {_count(names)} have moved from the training "
        f"data's {100 * moved:.0f} % of the way to the last batch's (momentum "
        f"{case.momentum(names[0]):g})"
    )


def _thawed_layers(case: Case, names: tuple[str, ...]) -> str:
    layers = [case.layer(name) for name in names]
    if any(p.requires_grad for layer in layers for p in layer.parameters(recurse=False)):
        return (
            f"weight and bias of {_count(names)} are those of the first checkpoint, but the "
            f"running statistics have changed since"
        )
    return f"weight and bias of {_count(names)} do not learn, but the running statistics still move"


def _stale(case: Case, names: tuple[str, ...]) -> str:
    rows = {name: case.rows[name] for name in names}
    worst = max(rows, key=lambda name: distance(rows[name].old, rows[name].new, rows[name].eps))
    row = rows[worst]
    low, high = row.std_ratio
    return (
        f"running statistics of {_count(names)} are not those of the training data; the farthest "
        f"are in {worst or 'the model itself'}: its means are {row.mean_shift:.2g} standard "
        f"deviations off, and the data's standard deviations are {low:.2g} to {high:.2g} times the "
        f"running ones"
    )


THAWED = Symptom(
    name="thawed statistics",
    is_shown_by=_is_thawed,
    what=_thawed_layers,
    why="model.train() lets layers update their statistics that were meant to stay frozen",
    fix="load their earlier statistics (or measure them anew: "
    f"{RECALIBRATE}), then nk.freeze_statistics(model), which freezes them in any mode",
)

FROZEN = Symptom(
    name="frozen at other statistics",
    is_shown_by=_is_frozen_or_stopped,
    what=lambda _, names: (
        f"{_count(names)} {'is frozen, or has' if len(names) == 1 else 'are frozen, or have'} "
        f"momentum 0 or track_running_stats off, at statistics that are not those of the training "
        f"data"
    ),
    why="training does not update them, so they stay wrong",
    fix=f"nk.thaw_statistics(model), with a momentum above 0 and track_running_stats on; "
    f"{RECALIBRATE}; nk.freeze_statistics(model)",
)

SYMPTOMS = (
    Symptom(
        name="broken statistics",
        is_shown_by=_is_not_valid,
        what=lambda _, names: (
            f"running statistics of {_count(names)} are not finite, or a variance is below 0"
        ),
        why="at evaluation every output behind these layers is wrong, and a running average never "
        "recovers from a value that is not finite",
        fix=f"find the batch that overflowed, then {RECALIBRATE}",
    ),
    Symptom(
        name="statistics never set",
        is_shown_by=_was_never_set,
        what=lambda _, names: (
            f"running statistics of {_count(names)} are 0 and 1, and no batch was counted"
        ),
        why="evaluation subtracts 0 and divides by 1, so it does not normalise at all",
        fix=f"load the whole checkpoint, buffers included; or {RECALIBRATE}",
    ),
    Symptom(
        name="16-bit statistics",
        is_shown_by=_is_16_bit,
        what=_narrow,
        why="16-bit rounding loses small updates, so the averages stop short of the data's",
        fix=f'nk.convert_norm_(model, "bn"), which keeps them in float32, then {RECALIBRATE}',
    ),
    FROZEN,
    THAWED,
    Symptom(
        name="dropout before the norm",
        is_shown_by=_follows_dropout,
        what=lambda case, names: (
            f"running statistics of {_count(names)} are those of inputs that "
            f"dropout has changed; evaluation drops nothing"
        ),
        why="dropout increases the variance, and only in training",
        fix=f"{RECALIBRATE}; in the next training put dropout after the last norm",
    ),
    Symptom(
        name="averages of few examples",
        is_shown_by=_averages_few_examples,
        what=_averages,
        why="the statistics are those of the last few examples, not of the data",
        fix=f"{RECALIBRATE}; train with a smaller momentum",
    ),
    Symptom(
        name="small last batch",
        is_shown_by=_follows_last_batch,
        what=_last_batch,
        why="the last batch of an epoch has the weight of a full one, and evaluation follows it",
        fix=f"{RECALIBRATE}; train with DataLoader(drop_last=True)",
    ),
    Symptom(
        name="stale statistics",
        is_shown_by=lambda *_: True,
        what=_stale,
        why="evaluation normalises by statistics of earlier weights or of other data",
        fix=RECALIBRATE,
    ),
)


def is_near(case: Case, name: str) -> bool:
    """Whether a layer's statistics are within a tenth of a standard deviation of the data's."""
    row = case.rows[name]
    return distance(row.old, row.new, row.eps) < NEAR_DISTANCE


def group_by_symptom(case: Case, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group layers by the name of the first symptom that each one shows."""
    found: dict[str, list[str]] = {}
    for name in names:
        symptom = next(each for each in SYMPTOMS if each.is_shown_by(case, name))
        found.setdefault(symptom.name, []).append(name)
    return {name: tuple(layers) for name, layers in found.items()}
