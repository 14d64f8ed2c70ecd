"""Recommend norms for a batch size, with the papers' numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from normkit.advice.candidates import CANDIDATES, Candidate
from normkit.advice.evidence import BATCH_SIZES, Evidence
from normkit.core.check import require_choice, require_count
from normkit.errors import OptionError
from normkit.spec import NormSpec
from normkit.text import table_lines

Task = Literal["classification", "detection", "segmentation", "video"]

RANKING: Mapping[Task, Mapping[int, tuple[str, ...]]] = {
    "classification": {
        1: ("bcn micro+ws", "gn+ws", "gn"),
        2: ("bcn micro+ws", "gn+ws", "bgn", "gbgn", "gn"),
        4: ("bcn micro+ws", "gn+ws", "bgn", "gn"),
        8: ("bgn", "gn+ws", "bn", "gn"),
        16: ("bgn", "bn", "xbn", "gn+ws"),
        32: ("bn", "xbn", "bgn", "bcn+ws", "bn+ws", "ghost"),
    },
    "detection": {
        1: ("bcn micro+ws", "gn+ws", "gn"),
        2: ("bcn micro+ws", "gn+ws", "gn", "xbn"),
        4: ("xbn", "bcn micro+ws", "gn+ws", "bn"),
        8: ("xbn", "bn", "gn+ws"),
    },
    "segmentation": {
        1: ("bcn micro+ws", "gn+ws", "gn"),
        16: ("bcn+ws", "gn+ws", "bn+ws", "bn"),
    },
    "video": {
        1: ("bcn micro+ws", "gn+ws", "gn"),
        8: ("bn+ws", "bcn+ws", "bn", "gn+ws"),
    },
}
"""Names of candidates, the best first, for batches of at least so many examples per worker.

docs/advice.md gives the reasons.
"""

MIN_UPDATING = 16
"""With fewer examples the statistics of a trained network should stay frozen."""

PRETRAINED = {"bn+ws": "bn+ws kept"}
"""Candidates that replace others if the network is trained already."""

RETRAINED = "it changes what a trained network computes: the network must be trained further"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """A recommended norm.

    Args:
        spec: Build it with ``spec.build(num_features)``; ``+ws`` standardizes the weights of the
            layers before the norm.
        apply: The call that puts it into ``model``, after ``import normkit as nk``;
            ``calibrate=batches`` takes batches of the training data.
        why: Reasons for the norm.
        evidence: Numbers measured nearest to this batch size, as printed.
        limits: Reasons against it, and gaps in the measurements.
        keeps_function: Whether a network trained with batch norm evaluates as before.
    """

    spec: NormSpec
    apply: str
    why: str
    evidence: tuple[Evidence, ...]
    limits: str
    keeps_function: bool

    def __str__(self) -> str:
        lines = [f"{self.spec}: {self.apply}", f"  why: {self.why}"]
        lines += [f"  evidence: {each}" for each in self.evidence]
        return "\n".join([*lines, f"  limits: {self.limits}"])

    def as_dict(self) -> dict[str, object]:
        """The fields as plain values, for JSON."""
        evidence = [each.as_dict() for each in self.evidence]
        return asdict(self) | {"spec": str(self.spec), "evidence": evidence}


class Recommendations(list[Recommendation]):
    """Norms for a batch size, best first; prints as a table."""

    def __str__(self) -> str:
        rows = [("", "spec", "apply", "measured")]
        for rank, each in enumerate(self, start=1):
            first = each.evidence[0] if each.evidence else None
            measured = f"{first.numbers} ({first.metric}; {first.place})" if first else "-"
            rows.append((str(rank), str(each.spec), each.apply, measured))
        return "\n".join(table_lines(rows, indent=""))

    def as_list(self) -> list[dict[str, object]]:
        """The recommendations as plain values, for JSON."""
        return [each.as_dict() for each in self]


def recommend(
    batch_size: int,
    *,
    per_worker: bool = True,
    workers: int | None = None,
    pretrained: bool = False,
    task: Task = "classification",
) -> Recommendations:
    """Rank norms for a batch size, with the papers' numbers.

    The ranking is a fixed table, which this project made from the papers' tables and its own runs;
    it does not depend on your data. ``normkit compare`` trains norms on your data.

    Args:
        batch_size: Examples of a training batch.
        per_worker: Whether each process has ``batch_size`` examples; otherwise all ``workers``
            together have them. Each process computes its own statistics; if yours are
            synchronized, pass ``per_worker=False, workers=1``.
        workers: Number of processes, with ``per_worker=False``.
        pretrained: Whether the network keeps weights that were trained with batch norm. Norms with
            which it predicts as before then come first.
        task: The network's task.

    Returns:
        A list of ``Recommendation``, best first. It prints as a table; each entry prints with its
        reasons.

    Raises:
        OptionError: If a number is no positive integer, there are more workers than examples,
            ``workers`` is missing or has no effect, or the task is unknown.

    Source:
        Zhou et al., table 2; Gunawan et al., table 2; Summers & Dinneen, section 3; Qiao et al.,
        tables 1 and 6-12; Huang et al., tables 2, 5 and 6.

    Example:
        >>> [str(each.spec) for each in recommend(2)[:3]]
        ['bcn:max=32:micro_batch+ws', 'gn:max=32+ws', 'bgn:max=1']
        >>> print(recommend(64)[0].evidence[0].numbers)
        BN 76.832, GN 76.544, BGN 77.104
    """
    size = _per_worker(require_count("batch_size", batch_size), per_worker, workers)
    require_choice("task", task, get_args(Task))
    nearest = min((*BATCH_SIZES, 1), key=lambda known: abs(math.log2(size / known)))
    steps = RANKING[task]
    names = steps[max(step for step in steps if step <= nearest)]
    if pretrained:
        names = ("bn kept" if nearest >= MIN_UPDATING else "bn frozen", *_keeping_first(names))
    found = (_recommendation(CANDIDATES[n], task, (size, nearest), pretrained) for n in names)
    return Recommendations(found)


def _keeping_first(names: tuple[str, ...]) -> list[str]:
    """Sort norms with which a trained network predicts as before to the front; leave out ``bn``."""
    others = [PRETRAINED.get(name, name) for name in names if name != "bn"]
    return sorted(others, key=lambda name: not CANDIDATES[name].keeps_function)


def _recommendation(
    candidate: Candidate, task: Task, sizes: tuple[int, int], pretrained: bool
) -> Recommendation:
    """Recommend a norm for a batch size, with the numbers at the nearest size that was measured."""
    batch_size, measured_size = sizes
    spec = NormSpec.parse(candidate.spec_for(batch_size))
    apply, limits = candidate.apply, candidate.limits
    if pretrained and not candidate.keeps_function:
        limits = f"{RETRAINED}; {limits}"
        if apply.startswith("nk.convert_norm_("):
            # Calibration makes the converted network start near the function of the trained one.
            apply = f"{apply[:-1]}, calibrate=batches)"
    return Recommendation(
        spec=spec,
        apply=apply.format(spec=spec),
        why=candidate.why,
        evidence=tuple(candidate.evidence(task, measured_size)),
        limits=limits,
        keeps_function=candidate.keeps_function,
    )


def _per_worker(batch_size: int, per_worker: bool, workers: int | None) -> int:
    """Number of examples in one process; if the processes have unequal numbers, the smallest.

    Raises:
        OptionError: If ``workers`` is missing, has no effect, or exceeds the number of examples.
    """
    if per_worker:
        if workers is not None:
            raise OptionError(
                f"workers={workers} was given with a batch size per worker, where it has no "
                f"effect; leave it out, or pass per_worker=False if all workers together have "
                f"{batch_size} examples"
            )
        return batch_size
    if workers is None:
        raise OptionError(
            f"per_worker=False says that {batch_size} examples are shared among workers; pass "
            f"workers=, their number"
        )
    if require_count("workers", workers) > batch_size:
        raise OptionError(
            f"{batch_size} examples were given for {workers} workers; each needs at least one"
        )
    return batch_size // workers
