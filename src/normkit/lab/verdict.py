"""The verdict: which norms are ahead of the first one at which batch size, with what confidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from normkit.lab.comparison import Cell, Comparison, Summary
from normkit.lab.frozen import Frozen
from normkit.lab.student import CONFIDENCE, DECIMALS, half_width, has_spread, num_to_decide
from normkit.lab.text import joined, signed

Word = Literal["ahead", "behind", "undecided", "diverges"]

MAX_MORE_SEEDS = 100
MAX_NAMED = 3  # largest number of norms that the first line names one by one
ONE_SEED = "one seed says nothing about spread; give --seeds 1,2,3"


class Judged(Frozen):
    """The judgement of one norm at one batch size, compared with the first norm.

    Args:
        norm: The norm.
        batch_size: The batch size.
        word: ``"ahead"`` or ``"behind"`` if the whole interval lies on that side of 0,
            ``"diverges"`` if a run of the norm diverged, else ``"undecided"``.
        num_seeds: Number of seeds for which both norms have a score.
        mean: Mean difference, norm minus first norm, in the unit of the score; ``None`` if the
            norms cannot be compared.
        low: Lower end of the interval; ``None`` if there is no interval.
        high: Upper end of the interval.
        more_seeds: Number of additional seeds that would probably decide; ``None`` if that cannot
            be estimated, or more than 100 would be needed.
        reason: Why the norm is neither ahead nor behind.
    """

    norm: str
    batch_size: int
    word: Word
    num_seeds: int = 0
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    more_seeds: int | None = None
    reason: str | None = None


class Verdict(Frozen):
    """The verdict on the norms of a sweep; as text, the answer and then a line for each norm.

    Args:
        first: The norm that the others are compared with.
        num_comparisons: Number of pairs of another norm and a batch size.
        higher_is_better: Whether a higher score is ahead.
        is_share: Whether scores are shares, which are written in percentage points.
        confidence: Probability that all intervals together contain the true differences.
        judged: The first norm at each batch size where it diverged, then every other norm at every
            batch size.
    """

    first: str
    num_comparisons: int
    higher_is_better: bool = True
    is_share: bool = True
    confidence: float = CONFIDENCE
    judged: tuple[Judged, ...]

    def of(self, norm: str, batch_size: int) -> Judged:
        """The judgement of a norm other than the first at a batch size."""
        return next(e for e in self.judged if (e.norm, e.batch_size) == (norm, batch_size))

    @property
    def lines(self) -> tuple[str, ...]:
        """One sentence with the answer, at most one line per norm, and the method."""
        wording = _Wording(self.first, self.is_share)
        answer = _answer(self, wording)
        lines = [wording.sentence(list(each)) for _, each in groupby(self.judged, _norm)]
        new = [] if _one_reason(self) else [line for line in lines if line not in answer]
        return (answer, *new, *_method(self))

    def __str__(self) -> str:
        return "\n".join(self.lines)


def verdict_of(comparison: Comparison) -> Verdict:
    r"""Judge every norm of a comparison against the first, by their differences seed by seed.

    .. math::  \bar d \pm t_{n-1,\,1 - \alpha / 2m} \; s / \sqrt{n}, \quad \alpha = 0.05

    with the mean difference, its standard deviation over ``n`` seeds, and ``m`` comparisons in the
    sweep. A norm is ahead, or behind, if its whole interval lies on that side of 0.

    A run that diverged has no score, and the remaining seeds are not a fair sample. So a norm with
    a diverged run ``"diverges"``, and where the first norm has one, the others are ``"undecided"``.
    Without spread there is no interval: one seed, or equal differences in all seeds, decide
    nothing.

    Args:
        comparison: The cells of a sweep, and the meaning of their scores.

    Numerics:
        The correction is Bonferroni's, which is valid for dependent comparisons; interval and word
        always agree. ``more_seeds`` takes the observed mean and spread for the true ones and asks
        for power 0.8, so it is as uncertain as they are. Judging again after each additional seed
        makes a wrong word slightly more frequent than 5 %.

    Example:
        >>> cells = [Cell(norm=norm, batch_size=2, accuracy=None, difference=difference,
        ...               step_time_s=None, peak_bytes=None, num_finished=3, num_diverged=0,
        ...               num_failed=0)
        ...          for norm, difference in (("bn", None), ("gn:8", Summary(
        ...              mean=0.041, spread=0.008, num_seeds=3)))]
        >>> print(verdict_of(Comparison(
        ...     norms=("bn", "gn:8"), batch_sizes=(2,), seeds=(1, 2, 3), cells=cells)).lines[0])
        gn:8 is ahead of bn at batch size 2 (+4.10 points, 95 % interval +2.11 to +6.09, 3 seeds).
    """
    first, *others = comparison.norms
    num_comparisons = len(others) * len(comparison.batch_sizes)
    rule = _Rule(
        confidence=1 - (1 - CONFIDENCE) / max(1, num_comparisons),
        higher_is_better=comparison.higher_is_better,
        num_seeds=len(comparison.seeds),
    )
    of_first = [comparison.cell(first, size) for size in comparison.batch_sizes]
    judged = [_diverging(cell) for cell in of_first if cell.num_diverged]
    judged += [_judged(comparison.cell(n, c.batch_size), c, rule) for n in others for c in of_first]
    return Verdict(
        first=first,
        num_comparisons=num_comparisons,
        higher_is_better=comparison.higher_is_better,
        is_share=comparison.is_share,
        judged=tuple(judged),
    )


class _Rule(NamedTuple):
    """The rule of the judgement, which is the same for all cells of a sweep."""

    confidence: float
    higher_is_better: bool
    num_seeds: int


def _judged(cell: Cell, base: Cell, rule: _Rule) -> Judged:
    if cell.num_diverged:
        return _diverging(cell)
    found = Judged(norm=cell.norm, batch_size=cell.batch_size, word="undecided")
    if base.num_diverged:
        return found.model_copy(update={"reason": f"{_diverged(base)} of {base.norm} diverged"})
    if cell.difference is None:
        return found.model_copy(update={"reason": "no seed finished with both norms"})
    return found.model_copy(update=_by_seeds(cell.difference, rule))


def _by_seeds(difference: Summary, rule: _Rule) -> Mapping[str, object]:
    """The fields of a judgement that follow from the differences of the seeds."""
    mean, spread, n = round(difference.mean, DECIMALS), difference.spread, difference.num_seeds
    found = {"mean": mean, "num_seeds": n}
    if spread is None or not has_spread(spread):
        return {**found, "reason": _no_spread(mean, n, rule.num_seeds)}
    half = half_width(spread, n, rule.confidence)
    found = {**found, "low": mean - half, "high": mean + half}
    if abs(mean) <= half:
        return {**found, **_what_would_decide(mean, spread, n, rule.confidence)}
    return {**found, "word": "ahead" if (mean > 0) == rule.higher_is_better else "behind"}


def _diverging(cell: Cell) -> Judged:
    return Judged(
        norm=cell.norm,
        batch_size=cell.batch_size,
        word="diverges",
        reason=f"{_diverged(cell)} diverged",
    )


def _diverged(cell: Cell) -> str:
    num_runs = cell.num_finished + cell.num_diverged + cell.num_failed
    return f"{cell.num_diverged} of {num_runs} {'run' if num_runs == 1 else 'runs'}"


def _no_spread(mean: float, n: int, num_asked: int) -> str:
    """Why differences without spread decide nothing."""
    if n == 1 and num_asked == 1:
        return ONE_SEED
    if n == 1:
        again = "the same command tries the others again"
        return f"only 1 of {num_asked} seeds finished with both norms; {again}"
    if not mean:
        return f"both came out equal in all {n} seeds"
    return f"all {n} seeds differ by the same amount, so nobody can say how sure that is"


def _what_would_decide(
    mean: float, spread: float, n: int, confidence: float
) -> Mapping[str, object]:
    if not mean:
        return {"reason": "the mean difference is 0"}
    enough = num_to_decide(abs(mean) / spread, n, n + MAX_MORE_SEEDS, confidence)
    if enough is None:
        return {"reason": f"more than {MAX_MORE_SEEDS} more seeds would be needed"}
    more = enough - n
    seeds = "seed" if more == 1 else "seeds"
    return {"more_seeds": more, "reason": f"about {more} more {seeds} would probably decide"}


class _Wording(NamedTuple):
    """The wording of differences from the first norm."""

    first: str
    is_share: bool

    def sentence(self, of_norm: Sequence[Judged]) -> str:
        """The sentence about a norm; batch sizes with the same word stand together."""
        by_word: dict[Word, list[Judged]] = {}
        for each in of_norm:
            by_word.setdefault(each.word, []).append(each)
        in_full = next((each for each in of_norm if each.low is not None), of_norm[0])
        clauses = [self._clause(w, each, in_full) for w, each in by_word.items()]
        return f"{of_norm[0].norm} {'; '.join(clauses)}."

    def outcome(self, word: Word) -> str:
        """A word as the rest of a sentence about a norm."""
        return {
            "ahead": f"is ahead of {self.first}",
            "behind": f"is behind {self.first}",
            "undecided": "is undecided",
            "diverges": "diverges",
        }[word]

    def named(self, word: Word, judged: Iterable[Judged]) -> list[str]:
        """The norms with this word and their batch sizes; only their number if there are many."""
        sizes: dict[str, list[int]] = {}
        for each in judged:
            sizes.setdefault(each.norm, []).append(each.batch_size)
        if len(sizes) > MAX_NAMED:
            side = self.outcome(word).removeprefix("is ")
            return [f"{len(sizes)} norms are {side} at some batch size"]
        return [f"{norm} {self.outcome(word)} at {_at(at)}" for norm, at in sizes.items()]

    def _clause(self, word: Word, judged: Sequence[Judged], in_full: Judged) -> str:
        sizes: dict[str, list[int]] = {}
        for each in judged:
            sizes.setdefault(self._details(each, each is in_full), []).append(each.batch_size)
        first, *others = sizes.items()
        said = [f"{_at(first[1])} ({first[0]})"]
        said += [f"{joined(at)} ({details})" for details, at in others]
        return f"{self.outcome(word)} at {joined(said)}"

    def _details(self, each: Judged, in_full: bool) -> str:
        """Difference, interval and reason, with units and whole words if ``in_full``."""
        reason = each.reason
        if each.more_seeds and not in_full:
            reason = f"about {each.more_seeds} more"
        return "; ".join(filter(None, [self._numbers(each, in_full), reason]))

    def _numbers(self, each: Judged, in_full: bool) -> str:
        if each.mean is None or each.low is None or each.high is None:
            return ""
        mean, low, high = map(self._difference, (each.mean, each.low, each.high))
        if not in_full:
            return f"{mean}, {low} to {high}"
        unit = " points" if self.is_share else ""
        return f"{mean}{unit}, 95 % interval {low} to {high}, {each.num_seeds} seeds"

    def _difference(self, value: float) -> str:
        return signed(100 * value) if self.is_share else signed(value, ".4g")


def _at(batch_sizes: Sequence[int]) -> str:
    return f"batch size{'s' if len(batch_sizes) > 1 else ''} {joined(batch_sizes)}"


def _norm(each: Judged) -> str:
    return each.norm


def _answer(verdict: Verdict, wording: _Wording) -> str:
    """The first line: the norms that are ahead or behind, and the number of the others."""
    of_first = [each for each in verdict.judged if each.norm == verdict.first]
    others = verdict.judged[len(of_first) :]
    trouble = f"{wording.sentence(of_first)} " if of_first else ""
    if not others:
        return f"{trouble}Only {verdict.first} was trained; name two norms or more to compare them."
    if len(others) == 1:
        return trouble + wording.sentence(others)
    reason = _one_reason(verdict)
    if reason:
        return f"{trouble}No norm is ahead of {verdict.first} or behind it: {reason}."
    return f"{trouble}{'; '.join(_clauses(others, wording))}."


def _one_reason(verdict: Verdict) -> str | None:
    """The reason why nothing is decided, if it is the same in all comparisons."""
    reasons = {each.reason for each in verdict.judged}
    is_open = all(each.word == "undecided" and each.low is None for each in verdict.judged)
    return reasons.pop() if is_open and len(reasons) == 1 else None


def _clauses(others: Sequence[Judged], wording: _Wording) -> list[str]:
    """The answer's parts: norms ahead, norms behind, the number of others, and the nearest one."""
    ahead, behind, rest = (
        [each for each in others if each.word in words]
        for words in (("ahead",), ("behind",), ("undecided", "diverges"))
    )
    clauses = wording.named("ahead", ahead) or [f"No norm is ahead of {wording.first}"]
    if len(ahead) == 1:
        clauses = [wording.sentence(ahead).removesuffix(".")]
    clauses += wording.named("behind", behind)
    clauses += [_counted(rest, len(others))] if rest else []
    return [*clauses, *_nearest(rest)]


def _counted(rest: Sequence[Judged], num_all: int) -> str:
    """Count the comparisons that are neither ahead nor behind, in words."""
    open_, diverging = (sum(e.word == word for e in rest) for word in ("undecided", "diverges"))
    if open_ == num_all:
        return f"{_all(num_all)} comparisons are undecided"
    said = [f"{open_} {'is' if open_ == 1 else 'are'} undecided"] if open_ else []
    said += [f"{diverging} {'has' if diverging == 1 else 'have'} diverged"] if diverging else []
    return f"of {num_all} comparisons {joined(said)}"


def _nearest(rest: Iterable[Judged]) -> list[str]:
    """The comparison that needs the fewest seeds for a decision, in words."""
    open_ones = [each for each in rest if each.more_seeds is not None]
    nearest = min(open_ones, key=lambda each: each.more_seeds or 0, default=None)
    if nearest is None:
        return []
    return [f"{nearest.reason} {nearest.norm} at batch size {nearest.batch_size}"]


def _method(verdict: Verdict) -> tuple[str, ...]:
    """The line about the method, if there are several intervals."""
    if not any(each.low is not None for each in verdict.judged) or verdict.num_comparisons == 1:
        return ()
    which = f"Intervals are of the differences to {verdict.first}, seed by seed"
    together = f"with 95 % confidence {_all(verdict.num_comparisons)} hold together"
    return (f"{which}; {together} (Student's t, Bonferroni).",)


def _all(number: int) -> str:
    return "both" if number == 2 else f"all {number}"
