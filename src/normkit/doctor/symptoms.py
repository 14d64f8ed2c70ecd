"""Signs by which wrong running statistics show where they come from.

A layer counts for the first sign that it shows; what shows none is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from normkit.doctor.states import Rows, distance
from normkit.inference.freeze import is_frozen
from normkit.inference.tracked import STATISTICS, why_still
from normkit.layers.base import BUFFERS

MEAN, VAR = BUFFERS
COUNT = STATISTICS[-1]
FEW_EXAMPLES = 64.0
"""A running average of fewer examples wanders from batch to batch."""
SMALL_LAST = 8
"""A last batch this many times smaller than the others counts as much as they do."""
NEAR_DISTANCE = 0.01
"""A tenth of a standard deviation, squared: what is nearer, and costs little, is not wrong."""
BETWEEN = 0.7
"""Share of a layer's values that lie between their start and the data's, if they have stalled."""
NEAR = 2.5
"""Factor within which a distance is as expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the signs look at.

    Args:
        model: The model.
        rows: Each layer's statistics, old, and new from the training data at evaluation.
        dropped: The same with dropout as in training; empty if there is none.
        last: The same of the last training batch alone; empty if that is no small one.
        sizes: Examples of each training batch.
        batch_size: Examples of a training batch, usually.
        reference: Statistics, and the parameters beside them, in the first checkpoint, by layer.
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
        """Weight of a new batch in a layer's running statistics; None averages all."""
        return getattr(self.layer(name), "momentum", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A cause of wrong statistics.

    Args:
        name: Its name.
        shows: ``shows(case, layer)``, whether a layer has the sign.
        what: What was found in these layers, with numbers.
        why: What it does.
        fix: The way out.
    """

    name: str
    shows: Callable[[Case, str], bool]
    what: Callable[[Case, tuple[str, ...]], str]
    why: str
    fix: str


RECALIBRATE = "nk.recalibrate(model, train_batches).apply()"


def _is_broken(case: Case, name: str) -> bool:
    old = case.rows[name].old
    return not all(old[key].isfinite().all() for key in BUFFERS) or bool((old[VAR] < 0).any())


def _is_new(case: Case, name: str) -> bool:
    old = case.rows[name].old
    start = bool((old[MEAN] == 0).all() and (old[VAR] == 1).all())
    return start and int(old.get(COUNT, torch.zeros(()))) == 0


def _is_16_bit(case: Case, name: str) -> bool:
    row = case.rows[name]
    values = torch.cat([row.old[key].flatten() for key in BUFFERS])
    narrow = any(_fits(values, dtype) for dtype in (torch.bfloat16, torch.float16))
    start = {MEAN: 0.0, VAR: 1.0}
    behind = [(row.old[key] - start[key]) / (row.new[key] - start[key]) for key in BUFFERS]
    between = [((share >= 0) & (share <= 1)).double().mean().item() for share in behind]
    return narrow and sum(between) / 2 >= BETWEEN


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)


def _stands_still(case: Case, name: str) -> bool:
    layer = case.layer(name)
    apart = case.model.training and not layer.training
    still = is_frozen(layer) or getattr(layer, "momentum", None) == 0 or bool(why_still(layer))
    return still or apart


def _is_thawed(case: Case, name: str) -> bool:
    layer = case.layer(name)
    own = dict(layer.named_parameters(recurse=False))
    learns = any(parameter.requires_grad for parameter in case.model.parameters())
    fixed = learns and bool(own) and not any(p.requires_grad for p in own.values())
    return fixed or _has_moved_alone(case, name, own)


def _has_moved_alone(case: Case, name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether statistics differ from the first checkpoint's while weight and bias do not."""
    before, old = case.reference.get(name, {}), case.rows[name].old
    if not own or not all(key in before for key in (*own, *BUFFERS)):
        return False
    learned = any(not _same(before[key], value) for key, value in own.items())
    return not learned and any(not _same(before[key], old[key]) for key in BUFFERS)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu(), b.detach().cpu().to(a.dtype))


def _follows_dropout(case: Case, name: str) -> bool:
    if name not in case.dropped:
        return False
    row = case.rows[name]
    with_drops = distance(row.old, case.dropped[name].new, row.eps)
    return 2 * with_drops < distance(row.old, row.new, row.eps)


def num_averaged(case: Case, name: str) -> float:
    r"""Examples in a running average, :math:`b (2 - m) / m`: those of a mean as sure as it."""
    momentum = case.momentum(name)
    return torch.inf if not momentum else case.batch_size * (2 - momentum) / momentum


def _averages_few(case: Case, name: str) -> bool:
    return num_averaged(case, name) < FEW_EXAMPLES


def has_small_last(sizes: tuple[int, ...]) -> bool:
    """Whether the last batch is much smaller than the others."""
    return len(sizes) > 1 and sizes[-1] * SMALL_LAST <= median(sizes)


def _follows_last(case: Case, name: str) -> bool:
    """Whether both statistics lie as far off as one step towards the last batch takes them."""
    momentum = case.momentum(name)
    if name not in case.last or not momentum:
        return False
    steps = (_moved(case, name, key) for key in BUFFERS)
    return all(momentum / NEAR <= step <= NEAR * momentum for step in steps)


def _moved(case: Case, name: str, key: str) -> float:
    """How far a statistic is from the population's, in distances of the last batch's from it."""
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
    return (
        f"all running statistics of {_count(names)} are 16-bit numbers, kept in wider buffers, "
        f"and lag behind the data"
    )


def _last_batch(case: Case, names: tuple[str, ...]) -> str:
    moved = median(_moved(case, name, MEAN) for name in names)
    return (
        f"the last training batch has {case.sizes[-1]} of usually {case.batch_size} examples, and "
        f"the running means of {_count(names)} lie {100 * moved:.0f} % of its distance away from "
        f"the training data's (momentum {case.momentum(names[0]):g})"
    )


def _thawed_layers(case: Case, names: tuple[str, ...]) -> str:
    layers = [case.layer(name) for name in names]
    if any(p.requires_grad for layer in layers for p in layer.parameters(recurse=False)):
        return (
            f"weight and bias of {_count(names)} are those of the first checkpoint, but the "
            f"running statistics have moved since"
        )
    return f"weight and bias of {_count(names)} do not learn, but the running statistics still move"


def _stale(case: Case, names: tuple[str, ...]) -> str:
    rows = {name: case.rows[name] for name in names}
    worst = max(rows, key=lambda name: distance(rows[name].old, rows[name].new, rows[name].eps))
    row = rows[worst]
    low, high = row.std_ratio
    return (
        f"running statistics of {_count(names)} are not those of the training data; most in "
        f"{worst or 'the model itself'}, whose means are {row.mean_shift:.2g} standard deviations "
        f"off, and the data's standard deviations {low:.2g} to {high:.2g} times the running ones"
    )


THAWED = Sign(
    name="thawed statistics",
    shows=_is_thawed,
    what=_thawed_layers,
    why="a .train() has thawed layers that were meant to stand still",
    fix="load their statistics from before (or measure them anew: "
    f"{RECALIBRATE}), then nk.freeze_statistics(model), which holds in any mode",
)

FROZEN = Sign(
    name="frozen at other statistics",
    shows=_stands_still,
    what=lambda _, names: (
        f"{_count(names)} {'is frozen, or has' if len(names) == 1 else 'are frozen, or have'} "
        f"momentum 0 or track_running_stats off, at statistics that are not those of the training "
        f"data"
    ),
    why="they stand still in training, so nothing brings them nearer",
    fix=f"nk.thaw_statistics(model), with a momentum above 0 and track_running_stats on; "
    f"{RECALIBRATE}; nk.freeze_statistics(model)",
)

SIGNS = (
    Sign(
        name="broken statistics",
        shows=_is_broken,
        what=lambda _, names: (
            f"running statistics of {_count(names)} are not finite, or a variance is below 0"
        ),
        why="everything after these layers is lost at evaluation, and averages never recover",
        fix=f"find the batch that overflowed, then {RECALIBRATE}",
    ),
    Sign(
        name="statistics never set",
        shows=_is_new,
        what=lambda _, names: (
            f"running statistics of {_count(names)} are 0 and 1, and no batch was counted"
        ),
        why="evaluation subtracts 0 and divides by 1 where training normalised",
        fix=f"load the whole checkpoint, buffers included; or {RECALIBRATE}",
    ),
    Sign(
        name="16-bit statistics",
        shows=_is_16_bit,
        what=_narrow,
        why="small steps are rounded away, so that the averages stall on their way",
        fix=f'nk.convert_norm_(model, "bn"), which keeps them in float32, then {RECALIBRATE}',
    ),
    FROZEN,
    THAWED,
    Sign(
        name="dropout before the norm",
        shows=_follows_dropout,
        what=lambda case, names: (
            f"running statistics of {_count(names)} are those of inputs that "
            f"dropout has changed; at evaluation nothing is dropped"
        ),
        why="dropout widens the variance in training only",
        fix=f"{RECALIBRATE}; in the next training put dropout after the last norm",
    ),
    Sign(
        name="averages of few examples",
        shows=_averages_few,
        what=_averages,
        why="the statistics are those of the last few examples, not of the data",
        fix=f"{RECALIBRATE}; in training, a smaller momentum",
    ),
    Sign(
        name="small last batch",
        shows=_follows_last,
        what=_last_batch,
        why="the last batch of an epoch counts as much as any, and evaluation comes right after it",
        fix=f"{RECALIBRATE}; in training, DataLoader(drop_last=True)",
    ),
    Sign(
        name="stale statistics",
        shows=lambda *_: True,
        what=_stale,
        why="evaluation normalises by statistics of other weights or other data",
        fix=RECALIBRATE,
    ),
)


def is_near(case: Case, name: str) -> bool:
    """Whether a layer's statistics are those of the data, but for a tenth of a deviation."""
    row = case.rows[name]
    return distance(row.old, row.new, row.eps) < NEAR_DISTANCE


def sort_by_sign(case: Case, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Layers by the names of signs; one counts for the first that it shows."""
    found: dict[str, list[str]] = {}
    for name in names:
        sign = next(sign for sign in SIGNS if sign.shows(case, name))
        found.setdefault(sign.name, []).append(name)
    return {name: tuple(layers) for name, layers in found.items()}
