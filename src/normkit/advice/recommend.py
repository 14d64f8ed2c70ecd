"""Which norm to take for a batch size, and what the papers measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
"""Best first, from this many examples per worker on; docs/advice.md has the reasons."""

MOVING = 16
"""From this many examples on the statistics of a trained network may move."""

KEPT = {"bn+ws": "bn+ws kept"}
"""Other ways to put a norm into a trained network."""

RETRAINED = "it changes what a trained network computes: its weights must be trained on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """A norm for a batch size.

    Args:
        spec: Build it with ``spec.build(num_features)``; ``+ws`` concerns the layers before.
        apply: The call that puts it into ``model``, with ``import normkit as nk``, and where there
            is ``calibrate=batches``, batches of the training data.
        why: What speaks for it.
        evidence: What was measured nearest to this batch size, as printed.
        limits: What speaks against it, or was not measured.
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
        """All of it as plain values, for JSON."""
        return {
            "spec": str(self.spec),
            "apply": self.apply,
            "why": self.why,
            "evidence": [each.as_dict() for each in self.evidence],
            "limits": self.limits,
            "keeps_function": self.keeps_function,
        }


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
        """All of them as plain values, for JSON."""
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

    The ranking is a table of this project, written from the papers' tables and its own runs; it
    does not know your data. ``normkit compare`` trains on them.

    Args:
        batch_size: Examples of a training batch.
        per_worker: Whether one process computes that many; else all ``workers`` together do.
            Statistics are of one process, unless they are synchronized: then pass
            ``per_worker=False, workers=1``.
        workers: Number of processes, where ``batch_size`` is of all of them.
        pretrained: Whether weights trained with batch norm are to be kept: norms with which they
            predict as before come first.
        task: What the network is for.

    Returns:
        A list of ``Recommendation``, best first. It prints as a table, each of them with its
        reasons.

    Raises:
        OptionError: If a number is no count, there are more workers than examples, ``workers``
            is missing or of no use, or the task is unknown.

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
        names = ("bn kept" if nearest >= MOVING else "bn frozen", *_keeping_first(names))
    found = (_recommendation(CANDIDATES[n], task, (size, nearest), pretrained) for n in names)
    return Recommendations(found)


def _keeping_first(names: tuple[str, ...]) -> list[str]:
    """Those with which a trained network predicts as before, then the others; bn is there."""
    others = [KEPT.get(name, name) for name in names if name != "bn"]
    return sorted(others, key=lambda name: not CANDIDATES[name].keeps_function)


def _recommendation(
    found: Candidate, task: Task, sizes: tuple[int, int], pretrained: bool
) -> Recommendation:
    """Recommend a norm for a batch size, by what was measured at the nearest."""
    size, nearest = sizes
    spec = NormSpec.parse(found.spec_for(size))
    warns = pretrained and not found.keeps_function
    return Recommendation(
        spec=spec,
        apply=_calibrated(found.apply, warns).format(spec=spec),
        why=found.why,
        evidence=tuple(found.evidence(task, nearest)),
        limits=f"{RETRAINED}; {found.limits}" if warns else found.limits,
        keeps_function=found.keeps_function,
    )


def _calibrated(apply: str, is_trained: bool) -> str:
    """Let a conversion of a trained network start near what the network computes."""
    converts = apply.startswith("nk.convert_norm_(")
    return f"{apply[:-1]}, calibrate=batches)" if converts and is_trained else apply


def _per_worker(batch_size: int, per_worker: bool, workers: int | None) -> int:
    """Examples that share statistics; of unequal shares the smallest.

    Raises:
        OptionError: If ``workers`` is missing, of no use, or more than there are examples.
    """
    if per_worker:
        if workers is not None:
            raise OptionError(
                f"workers={workers} was given with a batch size per worker, where it changes "
                f"nothing; leave it out, or pass per_worker=False if {batch_size} is of all workers"
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
