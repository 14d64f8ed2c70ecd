"""What a sweep's verdict says, against intervals of scipy's paired test."""

import itertools

import pytest
from scipy import stats

from normkit.lab.comparison import compared
from normkit.lab.spec import SweepSpec
from normkit.lab.verdict import Verdict, verdict_of

FAR_AHEAD = (0.10, 0.11, 0.12)
UNCLEAR = (0.03, -0.01, 0.02)
BASE = (0.50, 0.58, 0.53, 0.55, 0.51)
DIVERGED = {"accuracy": None, "status": "diverged", "diverged_step": 3}


@pytest.fixture
def sweep_of(protocol, record):
    """A comparison in which each norm differs from `bn` by given amounts, one for each seed."""

    def make(differences, batch_sizes=(2,), seeds=(1, 2, 3), instead=()):
        sweep = SweepSpec(
            protocol=protocol, norms=("bn", *differences), batch_sizes=batch_sizes, seeds=seeds
        )
        records = []
        for norm, size, (i, seed) in itertools.product(sweep.norms, batch_sizes, enumerate(seeds)):
            by = differences.get(norm, [0.0] * len(seeds))
            by = by[size] if isinstance(by, dict) else by
            records.append(record(norm, size, seed, BASE[i] + by[i]))
        return compared(sweep, [*records, *instead])

    return make


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        (FAR_AHEAD, "ahead"),
        (tuple(-d for d in FAR_AHEAD), "behind"),
        (UNCLEAR, "undecided"),
    ],
)
def test_the_interval_and_its_word_are_those_of_the_paired_test(sweep_of, differences, word):
    found = verdict_of(sweep_of({"ln": differences})).of("ln", 2)
    test = stats.ttest_rel([b + d for b, d in zip(BASE, differences, strict=False)], BASE[:3])
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (found.word, found.num_seeds) == (word, 3)
    assert (found.word != "undecided") == (test.pvalue < 0.05)


def test_intervals_are_wider_the_more_is_compared(sweep_of):
    alone = verdict_of(sweep_of({"ln": UNCLEAR})).of("ln", 2)
    many = verdict_of(sweep_of({"ln": UNCLEAR, "gn:2": UNCLEAR}, batch_sizes=(2, 4, 8)))
    assert many.num_comparisons == 6
    low, high = stats.ttest_1samp(UNCLEAR, 0).confidence_interval(1 - 0.05 / 6)
    assert (many.of("gn:2", 8).low, many.of("gn:2", 8).high) == pytest.approx((low, high))
    assert low < alone.low < alone.high < high


def test_what_one_comparison_decides_many_may_not(sweep_of):
    by = (0.02, 0.03, 0.04)  # p = 0.035
    assert verdict_of(sweep_of({"ln": by})).of("ln", 2).word == "ahead"
    many = verdict_of(sweep_of({"ln": by, "gn:2": UNCLEAR}))
    assert many.of("ln", 2).word == "undecided"


def test_a_lower_score_is_ahead_where_lower_is_better(sweep_of):
    comparison = sweep_of({"ln": FAR_AHEAD})
    found = verdict_of(
        comparison.model_copy(
            update={"metric": "loss", "higher_is_better": False, "is_share": False}
        )
    )
    assert found.of("ln", 2).word == "behind"
    assert found.lines == (
        "ln is behind bn at batch size 2 (+0.11, 95 % interval +0.08516 to +0.1348, 3 seeds).",
    )


def test_an_undecided_norm_gets_the_seeds_that_would_probably_decide(sweep_of):
    found = verdict_of(sweep_of({"ln": UNCLEAR})).of("ln", 2)
    n = 3 + found.more_seeds
    effect = (sum(UNCLEAR) / 3) / stats.tstd(UNCLEAR)

    def chance(n):
        return stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, effect * n**0.5)

    assert chance(n - 1) < 0.8 <= chance(n)
    assert found.reason == f"about {found.more_seeds} more seeds would probably decide"


def test_seeds_that_nobody_would_run_are_not_counted(sweep_of):
    found = verdict_of(sweep_of({"ln": (0.03, -0.02, -0.004)})).of("ln", 2)
    assert (found.word, found.more_seeds) == ("undecided", None)
    assert found.reason == "more than 100 more seeds would be needed"


def test_a_mean_of_zero_is_not_decided_by_more_seeds(sweep_of):
    found = verdict_of(sweep_of({"ln": (0.03, -0.03, 0.0)})).of("ln", 2)
    assert (found.mean, found.more_seeds) == (0.0, None)
    assert found.reason == "the mean difference is 0"


def test_one_seed_decides_nothing_and_says_what_to_give(sweep_of):
    found = verdict_of(sweep_of({"ln": [0.3], "gn:2": [0.2]}, batch_sizes=(2, 4), seeds=(1,)))
    assert found.of("ln", 2).word == "undecided"
    assert (found.of("ln", 2).mean, found.of("ln", 2).low) == (0.3, None)
    why = "one seed says nothing about spread; give --seeds 1,2,3"
    assert found.lines == (f"No norm is ahead of bn or behind it: {why}.",)


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (0.0, "both came out equal in all 3 seeds"),
        (0.1, "all 3 seeds differ by the same amount, so nobody can say how sure that is"),
    ],
)
def test_equal_differences_have_no_interval_and_decide_nothing(sweep_of, by, reason):
    found = verdict_of(sweep_of({"ln": (by, by, by)})).of("ln", 2)  # rounding differs by 1e-17
    assert (found.word, found.low, found.more_seeds) == ("undecided", None, None)
    assert found.mean == pytest.approx(by)
    assert found.reason == reason


def test_a_norm_that_diverged_once_is_never_ahead(sweep_of, record):
    gone = record("ln", 2, 3, **DIVERGED)
    comparison = sweep_of({"ln": FAR_AHEAD, "gn:2": UNCLEAR}, instead=[gone])
    assert comparison.cell("ln", 2).difference.num_seeds == 2  # the survivors, far ahead
    found = verdict_of(comparison)
    assert found.of("ln", 2).word == "diverges"
    assert found.of("ln", 2).mean is None
    assert "ln diverges at batch size 2 (1 of 3 runs diverged)." in found.lines
    assert "of 2 comparisons 1 is undecided and 1 has diverged" in found.lines[0]


def test_where_the_first_norm_diverged_nothing_is_compared(sweep_of, record):
    gone = record("bn", 2, 3, **DIVERGED)
    by = {2: FAR_AHEAD, 4: FAR_AHEAD}
    found = verdict_of(sweep_of({"ln": by}, batch_sizes=(2, 4), instead=[gone]))
    assert (found.of("ln", 2).word, found.of("ln", 2).mean) == ("undecided", None)
    assert found.of("ln", 2).reason == "1 of 3 runs of bn diverged"
    assert found.of("ln", 4).word == "ahead"
    assert found.lines[0].startswith(
        "bn diverges at batch size 2 (1 of 3 runs diverged). ln is ahead of bn at batch size 4 (+11"
    )


def test_failed_and_missing_runs_leave_their_seed_out(sweep_of, record, protocol):
    failed = record("ln", 2, 3, None, status="failed")
    found = verdict_of(sweep_of({"ln": FAR_AHEAD}, instead=[failed])).of("ln", 2)
    low, high = stats.ttest_1samp(FAR_AHEAD[:2], 0).confidence_interval(0.95)
    assert (found.num_seeds, found.low, found.high) == pytest.approx((2, low, high))
    more = record("ln", 2, 2, None, status="failed")
    found = verdict_of(sweep_of({"ln": FAR_AHEAD}, instead=[failed, more])).of("ln", 2)
    assert "only 1 of 3 seeds finished with both norms; the same command" in found.reason
    nothing = compared(
        SweepSpec(protocol=protocol, norms=("bn", "ln"), batch_sizes=(2,), seeds=(1,)), []
    )
    assert verdict_of(nothing).of("ln", 2).reason == "no seed finished with both norms"


def test_the_first_line_answers_and_each_norm_has_one_line(sweep_of):
    differences = {
        "ln": {2: FAR_AHEAD, 8: UNCLEAR},
        "gn:2": {2: UNCLEAR, 8: (-0.20, -0.21, -0.22)},
    }
    lines = verdict_of(sweep_of(differences, batch_sizes=(2, 8))).lines
    assert lines[0] == (
        "ln is ahead of bn at batch size 2 (+11.00 points, 95 % interval +5.88 to +16.12, 3 "
        "seeds); gn:2 is behind bn at batch size 8; of 4 comparisons 2 are undecided; about 28 "
        "more seeds would probably decide ln at batch size 8."
    )
    assert [line.split()[0] for line in lines[1:]] == ["ln", "gn:2", "Intervals"]
    assert lines[2].endswith("; is behind bn at batch size 8 (\N{MINUS SIGN}21.00, "
                             "\N{MINUS SIGN}26.12 to \N{MINUS SIGN}15.88).")  # fmt: skip
    assert "all 4 hold together" in lines[3]


def test_two_comparisons_are_both(sweep_of):
    lines = verdict_of(sweep_of({"ln": UNCLEAR, "gn:2": UNCLEAR})).lines
    assert lines[0].startswith("No norm is ahead of bn; both comparisons are undecided; about ")
    assert "with 95 % confidence both hold together" in lines[-1]


def test_many_norms_are_counted_and_the_first_line_stays_short(sweep_of):
    norms = ["ln", "gn:2", "gn:4", "gn:8", "in", "sn", "bgn:2", "ghost:2"]
    far = [d + 0.2 for d in (0.1, 0.101, 0.102)]
    lines = verdict_of(sweep_of(dict.fromkeys(norms, far), batch_sizes=(2, 4, 8, 16))).lines
    assert lines[0] == "8 norms are ahead of bn at some batch size."
    assert len(lines) == 1 + 8 + 1


def test_a_sweep_of_one_norm_compares_nothing(sweep_of, record):
    assert verdict_of(sweep_of({})).lines == (
        "Only bn was trained; name two norms or more to compare them.",
    )
    gone = [record("bn", 2, 1, **DIVERGED)]
    assert verdict_of(sweep_of({}, instead=gone)).lines[0].startswith("bn diverges at batch size 2")


def test_a_verdict_is_a_value_that_json_carries(sweep_of):
    found = verdict_of(sweep_of({"ln": UNCLEAR, "gn:2": FAR_AHEAD}))
    assert Verdict.model_validate_json(found.model_dump_json()) == found
    assert str(found) == "\n".join(found.lines)
