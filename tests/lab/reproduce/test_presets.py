"""Every preset from end to end at the scale of seconds."""

import json

import pytest
import torch

from normkit.cli import main
from normkit.lab.data import load
from normkit.lab.data.known import KNOWN, random_dataset
from normkit.lab.data.sources import FASHION_MNIST_FOLDER
from normkit.lab.reproduce import (
    PRESETS,
    SCALES,
    as_markdown,
    as_text,
    conclude,
    measured,
    run_missing,
)
from normkit.lab.reproduce.tasks.settings import SIZES, Data


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
        assert preset.differences(scale) or scale == "paper"  # each takes several seeds at least
    assert preset.scales.keys() == {*SCALES}
    assert preset.at("small").num_seeds >= 3


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_sizes_that_sections_name_are_those_of_the_data(name):
    if name == "fashion-mnist" and not FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("fashion-mnist is not installed")
    data = load(name)
    channels, height, _ = data.input_shape
    expected = (len(data.train), len(data.test), height, {1: "grey", 3: "colour"}[channels])
    assert Data(data=name).sizes_of_data == expected
    whole = Data(data=name, hold_out=False)
    assert whole.sizes_of_data.train == len(data.train) + len(data.validation)
    if name == "digits":
        assert len(whole.load_data().train) == whole.sizes_of_data.train


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_the_paper_scale_of_a_figure_can_be_built_exactly(preset):
    settings = preset.at("paper").settings
    known, sizes = KNOWN[settings.data], settings.sizes_of_data
    assert (known.num_test, known.input_shape[1]) == (SIZES[settings.data].test, sizes.side)
    data = random_dataset(settings.data, settings.num_train, settings.hold_out)
    assert len(data.train) == sizes.train
    for arm in preset.arms(settings):
        with torch.device("meta"):
            network = preset.task.network(settings, arm, data, 1)
            assert network(torch.empty(2, *known.input_shape)).shape == (2, known.num_classes)
        assert settings.step_size(arm) <= max(sizes[:2])


def test_a_dry_run_of_a_figure_measures_a_step_of_each_arm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    given = ["--scale", "paper", "--dry-run", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["reproduce", "h-f5", *given, "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["gnbn-small-training-sets"]
    assert "MNIST is not there" in part["missing"]
    cells = {cell["norm"]: cell for cell in part["cells"]}
    assert cells["gnbn-32"]["batch_size"] == 32
    assert {cell["num_steps"] for cell in cells.values()} == {81}
    assert all(cell["step_time_s"] > 0 and cell["num_runs"] == 5 for cell in cells.values())
    assert not (tmp_path / "out").exists()


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
    said = PRESETS["lipschitz"].differences("small")
    assert {"batch size 32 (paper: 256)", "learning rate 0.05 (paper: 0.1)"} <= {*said}
