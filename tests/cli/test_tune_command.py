"""`normkit tune`."""

import json

import pytest
from safetensors import safe_open

import normkit as nk
from normkit.cli import main
from normkit.lab.models import build_model

SMALL = ("--model", "small-resnet", "--data", "digits", "--examples", "60", "--batch-size", "20")


@pytest.fixture
def normkit(capsys):
    """Run a command; returns the exit code, the output and the errors."""

    def run(*arguments):
        code = main(["tune", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_checkpoint_is_tuned_tested_saved_and_drawn(normkit, trained, tmp_path):
    saved, drawn = tmp_path / "new" / "tuned.safetensors", tmp_path / "curve.svg"
    code, output, errors = normkit(
        *(*SMALL, "--checkpoint", trained, "--save", str(saved), "--plot", str(drawn), "--json")
    )
    assert code == 0
    found = json.loads(output)
    assert found["significant"]
    assert 0 < found["alpha"] == found["best"] <= 1
    assert found["test_gain"]["num_examples"] == 60
    assert len(found["curve"]) > 11
    assert f"weights: {saved}" in errors
    assert f"curve: {drawn}" in errors
    assert drawn.read_text().lstrip().startswith("<?xml")
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["example_weight"]) == found["alpha"]
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    nk.convert_norm_(model, "bn")
    model.load_state_dict(weights)
    assert {m.example_weight for m in model.modules() if isinstance(m, nk.BatchNorm)} == {
        found["alpha"]
    }


def test_the_text_says_what_was_chosen_and_what_it_gains_on_test_examples(
    normkit, trained, monkeypatch
):
    monkeypatch.setattr("normkit.tune.gradient.NUM_STEPS", 3)
    code, output, _ = normkit(*SMALL, "--checkpoint", trained, "--per-layer")
    assert code == 0
    lines = output.splitlines()
    assert lines[0].startswith("example weight of 5 layers, tuned for loss (smaller is better) on")
    assert "alpha is set to" in output
    assert sum(line.startswith("  ") and ": " in line for line in lines) == 5
    assert lines[-1].startswith("on 60 test examples it gains ")


def test_without_a_gain_nothing_changes(normkit):
    code, output, _ = normkit(*SMALL, "--metric", "accuracy")  # weights are random
    assert code == 0
    assert "alpha stays 0" in output
    assert output.splitlines()[-1] == "on the test examples nothing changes"


@pytest.mark.parametrize("norm", ["bn", "gn:4"])
def test_a_curve_is_printed_and_drawn_and_chooses_nothing(normkit, tmp_path, norm, capsys):
    drawn, weights = tmp_path / "curve.png", str(tmp_path / "weights.safetensors")
    task = ("--model", "small-resnet", "--num-classes", "10", "--input-shape", "1,8,8")
    assert main(["convert", *task, "--to", norm, "--save", weights]) == 0
    capsys.readouterr()
    given = (*SMALL, "--checkpoint", weights, "--curve")
    code, output, errors = normkit(*given, "--plot", str(drawn), "--json")
    assert code == 0
    found = json.loads(output)
    own = 0 if norm == "bn" else 1
    assert (found["num_examples"], found["own"]["alpha"]) == (60, own)
    assert len(found["points"]) == (14 if norm == "bn" else 17)
    assert f"curve: {drawn}" in errors
    assert drawn.stat().st_size > 1000
    code, output, _ = normkit(*given)
    assert output.startswith(f"Against the layers' own weights ({own}), on 60 examples: top 1 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--curve", "--per-layer"), "--curve was given with --save, --per-layer or --metric, but"),
        (("--data", "nothing"), "there is no data set 'nothing'"),
        (("--examples", "0"), "--examples was given 0; give 1 or more"),
        (("--batch-size", "-1"), "--batch-size was given -1; give 1 or more"),
        (("--save", "weights.pt"), "its name ends in .safetensors"),
        (("--plot", "curve.gif"), "its name ends in .png or .svg or .pdf"),
        (("--metric", "accuracy", "--per-layer"), "which has no gradient to follow"),
        (("--checkpoint", "nothing.pt"), "nothing.pt cannot be read"),
    ],
)
def test_misuse_is_said_in_a_line(normkit, arguments, message):
    code, output, errors = normkit(*SMALL, *arguments)
    assert code == 2
    assert output == ""
    assert message in errors
