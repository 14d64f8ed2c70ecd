import csv
import re
from pathlib import Path

import pytest
from scipy import stats

from lab.browser import requests_of, run
from normkit.errors import DataError
from normkit.lab.comparison import compared
from normkit.lab.models import PlacedNorm
from normkit.lab.report import render, write_report
from normkit.lab.report.comparison_charts import NARROW, accuracy_chart
from normkit.lab.report.page import best_norms
from normkit.lab.spec import SweepSpec
from normkit.lab.text import MINUS, MISSING
from normkit.lab.verdict import verdict_of

COMMAND = "normkit compare --norms bn,ln,bgn:auto --out 'a <b> & c'"


@pytest.fixture
def wide_sweep(protocol):
    return SweepSpec(
        protocol=protocol, norms=("bn", "ln", "bgn:auto"), batch_sizes=(2, 8, 32), seeds=(1, 2)
    )


@pytest.fixture
def records(wide_sweep, record):
    """Records in which `ln` is best at 2, `bn` at 32, and one run of each other kind."""
    made = []
    for spec in wide_sweep.runs():
        slope = {"bn": 0.1, "ln": -0.1, "bgn:auto": 0.0}[spec.norm]
        accuracy = 0.8 + slope * (spec.batch_size - 8) / 32 + spec.seed / 100
        resolved = "bgn:16" if spec.norm == "bgn:auto" else spec.norm
        norms = (PlacedNorm(name="2", norm=resolved, num_features=8, num_positions=1),)
        made.append(record(spec.norm, spec.batch_size, spec.seed, accuracy, norms=norms))
    diverged = {"status": "diverged", "message": "the loss was nan", "diverged_step": 7}
    failed = {"status": "failed", "message": "<script>alert(1)</script>"}
    troubled = (record("bn", 32, 2, None, **diverged), record("bgn:auto", 32, 2, None, **failed))
    replaced = {r.spec.key: r for r in troubled}
    return [replaced.get(r.spec.key, r) for r in made]


def rendered(sweep, records):
    return render(compared(sweep, records), records, COMMAND)


def test_the_report_fetches_nothing_and_may_not(wide_sweep, records):
    text = rendered(wide_sweep, records)
    assert re.findall(r"href\s*=\s*\S+", text) == ['href="results.csv">results.csv</a>,']
    assert not re.search(r"(src|action)\s*=|url\(|@import|https?://|fetch\(|import\(", text)
    assert "default-src 'none'" in text
    assert len(text) < 200_000


def test_what_users_wrote_is_escaped(wide_sweep, records):
    text = rendered(wide_sweep, records)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "a</span> <span>&lt;b&gt;</span> <span>&amp;</span>" in text


def test_troubled_runs_are_shown_with_their_message(wide_sweep, records):
    text = rendered(wide_sweep, records)
    assert "the loss was nan" in text
    assert ">1 diverged<" in text
    assert ">1 failed<" in text


def test_whiskers_and_axis_end_at_one_hundred_percent(protocol, record):
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(2, 8), seeds=(1, 2))
    records = [record("bn", size, seed, (0.9, 1.0)[seed - 1]) for size in (2, 8) for seed in (1, 2)]
    chart = accuracy_chart(compared(sweep, records), records, NARROW)
    assert chart.y_ticks[-1].text == "100"
    assert all(mark.high == chart.y_ticks[-1].at for mark in chart.series[0].marks)


def test_norms_that_tie_are_both_best(wide_sweep, record):
    records = [record("bn", 2), record("ln", 2), record("bgn:auto", 2, accuracy=0.4)]
    assert best_norms(compared(wide_sweep, records), 2) == ["bn", "ln"]
    assert best_norms(compared(wide_sweep, records), 8) == []


def test_kernels_are_shown_and_a_mixture_is_warned_of(wide_sweep, records):
    assert "<dd>not recorded</dd>" in rendered(wide_sweep, records)
    known = records[0].environment.model_copy(update={"kernels": "cpu (avx2)"})
    text = rendered(
        wide_sweep, [records[0].model_copy(update={"environment": known}), *records[1:]]
    )
    assert "cpu (avx2), not recorded <span" in text
    assert "computed by 2 kinds of kernels" in text


def test_a_report_without_any_record_is_still_a_page(wide_sweep):
    text = rendered(wide_sweep, [])
    assert "No runs yet" in text
    assert text.rstrip().endswith("</html>")


def test_a_report_replaces_an_older_one_whole(wide_sweep, records, tmp_path):
    (tmp_path / "report.html").write_text("old")
    path = write_report(tmp_path, compared(wide_sweep, records), records, COMMAND)
    assert path.read_text(encoding="utf-8") == rendered(wide_sweep, records)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.csv"]


def test_the_chart_has_the_interval_of_every_mean_and_a_dot_for_every_seed(protocol, record):
    sweep = SweepSpec(protocol=protocol, norms=("bn", "ln"), batch_sizes=(2,), seeds=(1, 2, 3))
    accuracies = (0.50, 0.53, 0.58)
    records = [record("bn", 2, i + 1, a) for i, a in enumerate(accuracies)]
    records += [record("ln", 2, seed, 0.6) for seed in (1, 2, 3)]  # no spread, no interval
    bn, ln = accuracy_chart(compared(sweep, records), records, NARROW).series
    low, high = stats.ttest_1samp(accuracies, 0).confidence_interval(0.95)
    assert bn.marks[0].title == (
        f"bn, batch size 2: 53.67 %, 95 % interval {100 * low:.2f} to {100 * high:.2f}"
    )
    per_point = (bn.marks[0].dots[2] - bn.marks[0].dots[0]) / 8
    assert bn.marks[0].low - bn.marks[0].high == pytest.approx(
        -per_point * 100 * (high - low), 1e-3
    )
    assert (ln.marks[0].low, ln.marks[0].title) == (None, "ln, batch size 2: 60.00 %")
    assert ln.marks[0].dots == (ln.marks[0].y,) * 3
    assert bn.marks[0].x < ln.marks[0].x  # side by side


def test_a_mean_of_survivors_has_no_interval_and_says_so(protocol, record):
    sweep = SweepSpec(protocol=protocol, norms=("bn",), batch_sizes=(2,), seeds=(1, 2, 3))
    records = [record("bn", 2, 1, 0.5), record("bn", 2, 2, 0.6)]
    records += [record("bn", 2, 3, None, status="diverged", diverged_step=7)]
    mark = accuracy_chart(compared(sweep, records), records, NARROW).series[0].marks[0]
    assert (mark.low, mark.title) == (None, "bn, batch size 2: 55.00 %, 1 diverged")
    assert len(mark.dots) == 2


def test_the_verdict_comes_before_the_tables(wide_sweep, records):
    text = rendered(wide_sweep, records)
    answer = verdict_of(compared(wide_sweep, records)).lines[0]
    assert text.index(answer) < text.index("<table")
    assert answer.startswith("bn diverges at batch size 32 (1 of 2 runs diverged). ")


def test_survivors_are_not_compared_in_the_table_either(wide_sweep, records):
    text = rendered(wide_sweep, records)
    row = re.findall(f"<tr><th scope=.row.>ln {MINUS} bn.*?</tr>", text, re.DOTALL)[0]
    assert row.count('<span class="word undecided">') == 3
    assert f'<td class="number" data-value="">{MISSING}<span' in row  # bn diverged at 32


def test_the_runs_are_written_as_csv_beside_the_report(wide_sweep, records, tmp_path):
    write_report(tmp_path, compared(wide_sweep, records), records, COMMAND)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) == 18
    found = rows[0]
    first = records[0]
    assert (found["norm"], found["batch_size"], found["seed"]) == ("bn", "2", "1")
    assert float(found["test_accuracy"]) == first.outcome.scores["accuracy"]
    assert (float(found["step_time_s"]), found["peak_bytes"]) == (0.001, "1000")
    diverged = next(row for row in rows if row["status"] == "diverged")
    assert (diverged["norm"], diverged["test_accuracy"]) == ("bn", "")
    assert (diverged["diverged_step"], diverged["message"]) == ("7", "the loss was nan")


def test_a_report_that_cannot_be_written_is_named(wide_sweep, records, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(DataError, match=r"report.html cannot be read or written \(Is a directory"):
        write_report(tmp_path, compared(wide_sweep, records), records, COMMAND)


@pytest.fixture
def page(chromium, wide_sweep, records, tmp_path):
    """The report, open in a window 1280 wide."""
    path = write_report(tmp_path, compared(wide_sweep, records), records, COMMAND)
    chromium.set_window_size(1280, 1000)
    chromium.get_log("performance")  # what earlier pages left there
    chromium.get_log("browser")
    chromium.get(path.as_uri())
    return chromium


@pytest.mark.browser
def test_no_request_leaves_the_page(page):
    run(page, "document.querySelectorAll('th button').forEach((b) => b.click())")
    assert run(page, "performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert [Path(url).name for url in requests_of(page)] == ["report.html"]
    assert page.get_log("browser") == []  # nor did a script fail


@pytest.mark.browser
def test_a_request_would_be_seen(page):
    page.execute_script(
        "const i = new Image(); i.src = 'http://localhost:9/x'; document.body.append(i)"
    )
    page.execute_async_script("setTimeout(arguments[0], 300)")
    assert page.get_log("browser") != []  # the content policy refuses it, and says so


@pytest.mark.browser
def test_the_chart_shows_a_mark_for_every_cell(page):
    marks = "[...document.querySelectorAll('#accuracy-chart .wide .series')].map(%s)"
    assert run(page, marks % "(s) => s.dataset.norm") == ["bn", "ln", "bgn:auto"]
    assert run(page, marks % "(s) => s.querySelectorAll('.mark').length") == [3, 3, 3]
    heights = run(page, marks % "(s) => s.querySelector('.mark').getBoundingClientRect().top")
    assert heights[1] < heights[2] < heights[0]  # ln is best at batch size 2
    assert run(page, marks % "(s) => s.querySelectorAll('.dot').length") == [5, 6, 5]
    assert (
        len(set(run(page, marks % "(s) => getComputedStyle(s.querySelector('.line')).stroke"))) == 3
    )


@pytest.mark.browser
def test_learning_curves_are_drawn_for_every_batch_size(page):
    assert run(page, "document.querySelectorAll('.panel').length") == 3
    assert run(page, "document.querySelectorAll('.panel svg.chart').length") == 6


def column(page, body, index):
    rows = f"document.querySelector('#accuracy').tBodies[{body}].rows"
    return run(page, f"[...{rows}].map((r) => r.cells[{index}].textContent.trim())")


def click_heading(page, index):
    page.execute_script(f"document.querySelectorAll('#accuracy th button')[{index}].click()")
    heading = f"document.querySelector('#accuracy').tHead.rows[0].cells[{index}]"
    return run(page, f"{heading}.getAttribute('aria-sort')")


@pytest.mark.browser
def test_the_table_sorts_by_a_column_and_back(page):
    assert column(page, 0, 0) == ["bn", "ln", "bgn:auto"]
    assert click_heading(page, 1) == "descending"
    assert column(page, 0, 0) == ["ln", "bgn:auto", "bn"]
    assert column(page, 1, 0) == ["ln \N{MINUS SIGN} bn", "bgn:auto \N{MINUS SIGN} bn"]
    assert click_heading(page, 1) == "ascending"
    assert column(page, 0, 0) == ["bn", "bgn:auto", "ln"]
    assert click_heading(page, 3) == "descending"
    assert column(page, 0, 0) == ["bn", "bgn:auto", "ln"]
    assert click_heading(page, 0) == "ascending"
    assert column(page, 0, 0) == ["bgn:auto", "bn", "ln"]


@pytest.mark.browser
def test_the_best_of_each_column_is_marked(page):
    best = run(page, "[...document.querySelectorAll('.best')].map((c) => c.cellIndex)")
    assert sorted(best) == [1, 2, 2, 2, 3]  # at batch size 8 all three tie


@pytest.mark.browser
def test_resolved_arguments_and_the_command_are_there(page):
    text = run(page, "document.body.innerText")
    assert "bgn:16" in text
    assert run(page, "document.querySelector('pre').textContent") == COMMAND


@pytest.fixture
def seen_at(page):
    """Show the page at a width, in light or dark; afterwards as it was."""

    def show(width, scheme="light"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert run(page, "innerWidth") == width
        page.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
        return page

    yield show
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(seen_at, width):
    page = seen_at(width)
    page.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert run(page, "document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('#accuracy-chart > div')].map((d) => d.offsetWidth > 0)"
    assert run(page, shown) == [width > 640, width <= 640]
    sizes = "[...document.querySelectorAll('svg.chart')].filter((s) => s.clientWidth)"
    scales = run(page, f"{sizes}.map((s) => s.clientWidth / s.viewBox.baseVal.width)")
    assert min(scales) > 0.6  # or the charts' text could not be read


@pytest.mark.browser
def test_a_table_that_scrolls_says_so_until_its_end(seen_at):
    page = seen_at(400)
    page.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.execute_async_script("setTimeout(arguments[0], 100)")
    boxes = "[...document.querySelectorAll('.scroll')]"
    hidden = f"{boxes}.map((b) => b.scrollWidth - b.clientWidth > 1)"
    cues = f"{boxes}.map((b) => b.previousElementSibling.offsetHeight > 0)"
    assert run(page, cues) == run(page, hidden)
    assert True in run(page, hidden)
    page.execute_script(f"{boxes}.forEach((b) => (b.scrollLeft = 1e4))")
    page.execute_async_script("setTimeout(arguments[0], 100)")
    visible = "(b) => getComputedStyle(b.previousElementSibling).visibility === 'visible'"
    assert run(page, f"{boxes}.some({visible})") is False
    assert run(page, f"{boxes}.some((b) => b.classList.contains('more'))") is False


LUMINANCE = """
const of = (text) => {
  const parts = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
  const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = of(getComputedStyle(document.body).backgroundColor);
const contrast = (color) => {
  const [dark, light] = [of(color), paper].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
};
"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(seen_at, scheme):
    page = seen_at(1280, scheme)
    paper = page.execute_script(f"{LUMINANCE} return paper")
    assert (paper > 0.5) == (scheme == "light")
    texts = "[...document.querySelectorAll('p, li, th, td, h1, h2, figcaption, a, .word')]"
    found = page.execute_script(
        f"{LUMINANCE} return {texts}.map((e) => contrast(getComputedStyle(e).color))"
    )
    assert min(found) > 4.5  # what WCAG asks of text
    lines = "[...document.querySelectorAll('.legend .line')]"
    found = page.execute_script(
        f"{LUMINANCE} return {lines}.map((e) => contrast(getComputedStyle(e).stroke))"
    )
    assert min(found) > 3  # and of figures
