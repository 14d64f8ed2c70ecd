"""Every preset from end to end at the scale of seconds."""

import pytest

from normkit.lab.data import load
from normkit.lab.data.sources import FASHION_MNIST_FOLDER
from normkit.lab.reproduce import (
    PRESETS,
    as_markdown,
    as_text,
    conclude,
    measured,
    run_missing,
)
from normkit.lab.reproduce.tasks.settings import SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Presets share the runs that several of them need."""
    return tmp_path_factory.mktemp("reproduce")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_a_preset_runs_judges_and_draws(preset, folder):
    records = run_missing(preset, "tiny", folder)
    result = conclude(preset, "tiny", records)
    assert len(result.claims) == len(preset.claims) > 0
    for judged in result.claims:
        assert judged.verdict.num_seeds == 3
        assert judged.verdict.mean is not None, judged
    path = folder / f"{preset.name}.svg"
    preset.write_figure(measured(records), path)
    drawn = path.read_text()
    assert drawn.startswith("<?xml")
    assert "<text" in drawn  # and no outlines of letters
    assert preset.claims[0].text in as_text(result)
    page = as_markdown([result], "images/")
    assert (
        f"### {preset.name}\n\n{preset.title}: {preset.paper.authors}, {preset.figures}. " in page
    )
    assert f"](images/reproduce-{preset.name}.svg)" in page


def test_equal_runs_give_equal_figures(folder):
    preset = PRESETS["estimation-shift"]
    runs = measured(run_missing(preset, "tiny", folder))
    paths = [folder / name for name in ("one.svg", "two.svg")]
    for path in paths:
        preset.write_figure(runs, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"<dc:date>" not in paths[0].read_bytes()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_a_preset_says_how_it_differs_from_the_paper(preset):
    for scale in preset.scales:
        assert preset.specs(scale)
        facts = {*preset.at(scale).settings.facts(), "num_seeds"}
        assert facts == preset.original.keys()  # what the paper had, or that it is not said
        assert preset.differences(scale)  # each at least takes several seeds
    assert preset.at("small").num_seeds >= 3


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_sizes_that_sections_name_are_those_of_the_data(name):
    if name == "fashion-mnist" and not FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("fashion-mnist is not installed")
    data = load(name)
    channels, height, _ = data.input_shape
    expected = (len(data.train), len(data.test), height, {1: "grey", 3: "colour"}[channels])
    assert SIZES[name] == expected


def test_all_that_differs_is_said_also_where_the_paper_is_silent():
    said = PRESETS["output-noise"].differences("small")
    for difference in (
        "num train 3000 (paper: 50000)",
        "num test 2000 (paper: 10000)",
        "pictures 14x14 grey (paper: 32x32 colour)",
        "held out a tenth of the training examples (paper: not said)",
        "rate drop times 0.1 after 75 % of the training (paper: not said)",
    ):
        assert difference in said
    said = PRESETS["disturbed-statistics"].differences("small")
    assert {"batch size 32 (paper: 256)", "learning rate 0.05 (paper: 0.1)"} <= {*said}
