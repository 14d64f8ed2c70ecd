"""The report of a diagnosis, as text and in a browser."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import normkit as nk
from lab.browser import requests_of, run
from normkit.errors import DataError
from normkit.lab.report import render_diagnosis, write_diagnosis
from normkit.lab.report.diagnosis import heat_map

COMMAND = "normkit diagnose --checkpoint 'a <b> & c'"
DEPTH = 12


@pytest.fixture(scope="module")
def found():
    """A deep network on noise, two of whose layers are wrong; three earlier checkpoints."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1)]
    for _ in range(DEPTH):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    data = [(2 + torch.randn(32, 3, 6, 6), torch.randint(3, (32,))) for _ in range(6)]
    states = {"epoch 1": copy.deepcopy(model.state_dict())}
    nk.recalibrate(model, data, sequential=True).apply()
    states["epoch 2"] = copy.deepcopy(model.state_dict())
    model[10].running_var.div_(1e6)  # the loss grows, whatever the targets
    return nk.diagnose(model, data, data, checkpoints=states, try_fixes=True)


@pytest.fixture(scope="module")
def text(found):
    return render_diagnosis(found, "a <model>", COMMAND)


def test_the_report_fetches_nothing_and_may_not(text):
    assert not re.search(r"(src|href|action)\s*=|url\(|@import|https?://|fetch\(|import\(", text)
    assert "default-src 'none'" in text


def test_what_users_wrote_is_escaped(text, found):
    assert "a <model>" not in text
    assert "a &lt;model&gt;" in text
    cause = replace(found.causes[0], what="<script>alert(1)</script>")
    assert "<script>alert" not in render_diagnosis(replace(found, causes=(cause,)), "m", COMMAND)


def test_a_healthy_model_without_layers_is_still_a_page(found):
    bare = dict.fromkeys(("causes", "layers", "over_training", "sensitivity", "trials"), ())
    text = render_diagnosis(replace(found, shift=None, **bare), "m", COMMAND)
    assert "<h2>What was found</h2>" in text
    assert "Nothing wrong" in text
    assert "Layers by depth" not in text
    assert text.rstrip().endswith("</html>")


def test_shades_of_the_heat_map_follow_the_values(found):
    heat = heat_map(found)
    assert heat.names == ("epoch 1", "epoch 2", "now")
    cells = [cell for _, row in heat.rows for cell in row]
    values = [row.esm_std for each in found.over_training for row in each.shift.layers[1:]]
    assert (heat.low, heat.high) == (min(values), max(values))
    red = {float(cell.text): int(cell.colour[1:3], 16) for cell in cells}
    ordered = [red[value] for value in sorted(red)]
    assert ordered == sorted(ordered, reverse=True)
    assert (ordered[0], ordered[-1]) == (255, 0)
    assert {cell.dark for cell in cells if int(cell.colour[1:3], 16) < 127} == {True}


def test_a_report_replaces_an_older_one_whole(found, tmp_path):
    (tmp_path / "report.html").write_text("old")
    path = write_diagnosis(tmp_path, found, "m", COMMAND)
    assert "old" not in path.read_text(encoding="utf-8")[:3]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"report.html cannot be read or written"):
        write_diagnosis(tmp_path, found, "m", COMMAND)


@pytest.fixture
def page(chromium, found, tmp_path):
    """The report, open in a window 1280 wide."""
    path = write_diagnosis(tmp_path, found, "a <model>", COMMAND)
    chromium.set_window_size(1280, 1000)
    chromium.get_log("performance")  # what earlier pages left there
    chromium.get_log("browser")
    chromium.get(path.as_uri())
    return chromium


@pytest.mark.browser
def test_no_request_leaves_the_page_and_no_script_fails(page):
    run(page, "document.querySelectorAll('th button').forEach((b) => b.click())")
    assert [Path(url).name for url in requests_of(page)] == ["report.html"]
    assert page.get_log("browser") == []


@pytest.mark.browser
def test_the_page_says_what_the_diagnosis_says(page, found):
    assert run(page, "document.querySelectorAll('.reading').length") == 0  # causes say the same
    names = "[...document.querySelectorAll('.causes h3')].map((h) => h.textContent)"
    assert run(page, names) == [cause.name for cause in found.causes]
    fixes = "[...document.querySelectorAll('.causes > li > p code')].map((c) => c.textContent)"
    assert run(page, fixes) == [cause.fix for cause in found.causes]
    rows = "[...document.querySelectorAll('%s tbody tr')].map((r) => r.cells[1].textContent)"
    assert run(page, rows % "#states") == [f"{state.loss:.4g}" for state in found.states]
    tried = ["–" if trial.loss is None else f"{trial.loss:.4g}" for trial in found.trials]  # noqa: RUF001
    assert run(page, rows % "#trials") == tried
    assert run(page, "document.querySelectorAll('#heat td').length") == 3 * DEPTH
    assert run(page, "document.querySelector('pre').textContent") == COMMAND


@pytest.mark.browser
def test_arrow_keys_read_a_chart_value_by_value(page, found):
    chart = page.find_element("css selector", "#shift-chart .wide svg")
    page.execute_script("arguments[0].focus()", chart)
    said = "document.querySelector('#shift-chart output').textContent"
    first = f"1, 1, as the model is: {found.layers[0].esm_std:.4g}"
    assert run(page, said) == first
    chart.send_keys("\ue014")  # the right arrow
    assert run(page, said) == f"2, 4, as the model is: {found.layers[1].esm_std:.4g}"
    for _ in range(DEPTH):
        chart.send_keys("\ue015")  # the down arrow
    assert ", recalibrated: " in run(page, said)
    for _ in range(3 * DEPTH):
        chart.send_keys("\ue012")  # the left arrow stops at the first
    assert run(page, said) == first
    assert run(page, "document.querySelectorAll('#shift-chart .mark.current').length") == 1


@pytest.mark.browser
def test_charts_of_distances_begin_at_zero(page):
    charts = "[...document.querySelectorAll('#%s svg.chart')]"
    lowest = charts + ".map((s) => s.querySelector('text').textContent)"
    assert run(page, lowest % "shift-chart") == ["0", "0"]


@pytest.mark.browser
def test_layers_sort_by_what_they_cost(page, found):
    page.execute_script("document.querySelectorAll('#layers th button')[3].click()")
    first = run(page, "document.querySelector('#layers').tBodies[0].rows[0].cells[1].textContent")
    assert first == max(found.layers, key=lambda row: row.returns).name == "10"


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        assert run(page, "document.documentElement.scrollWidth") <= width
        shown = "[...document.querySelectorAll('#shift-chart > div')].map((d) => d.offsetWidth > 0)"
        assert run(page, shown) == [width > 640, width <= 640]
        scrolls = "[...document.querySelectorAll('#states, #trials')].map((t) => t.offsetWidth)"
        assert max(run(page, scrolls)) <= width  # read without scrolling sideways
        focus = "[...document.querySelectorAll('.scroll')].every((s) => s.tabIndex === 0)"
        assert run(page, focus)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_a_printed_page_shows_everything_but_what_needs_keys(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert run(page, "getComputedStyle(document.querySelector('output')).display") == "none"
        assert run(page, "document.querySelector('#heat').offsetHeight") > 0
        dashes = (
            "[...document.querySelectorAll('#shift-chart .wide .line')]"
            ".map((l) => getComputedStyle(l).strokeDasharray)"
        )
        assert len(set(run(page, dashes))) == 2  # lines differ without colour
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
