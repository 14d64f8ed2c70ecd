"""`normkit convert`, `validate` and `recommend`."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import normkit as nk
from normkit.cli import main
from normkit.lab.models import build_model

SMALL = ("--model", "small-resnet", "--num-classes", "10", "--input-shape", "1,8,8")


@pytest.fixture
def normkit(capsys):
    """Run a command; returns the exit code, the output and the errors."""

    def run(*arguments):
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_weights_are_converted_and_saved(normkit, tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    code, output, errors = normkit("convert", *SMALL, "--to", "gn:4", "--save", str(path))
    assert code == 0
    assert output.startswith("converted 5 of 5 norms")
    assert str(path) in errors
    model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    nk.convert_norm_(model, "gn:4")
    model.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert (about["model"], about["norms"]) == ("small-resnet", "gn:4")
    assert json.loads(about["changes"])["1"] == "gn:4"


def test_a_saved_conversion_brings_its_norms_with_it(normkit, tmp_path):
    first, second = (str(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    small = ("--model", "small-resnet")
    data = ("--calibrate", "digits", "--examples", "32")
    to = ("--to", "gn:4+ws", "--where", "3.*")
    assert normkit("convert", *small, *to, *data, "--save", first)[0] == 0
    again = ("--checkpoint", first, "--to", "bcn:8+ws", "--where", "4.*", "--save", second)
    code, output, errors = normkit("convert", *small, *again, *SMALL[2:])
    assert code == 0, errors
    assert "3.norm1 (GroupNorm(32))" in output
    code, output, _ = normkit("validate", *SMALL, "--checkpoint", second, "--batch-size", "32")
    assert code == 0
    state = load_file(second)
    assert any(key.startswith("3.conv1.parametrizations") and "length" in key for key in state)
    assert any(key.startswith("4.conv1.parametrizations") for key in state)
    assert not any(key.startswith("4.") and "length" in key for key in state)


def test_a_checkpoint_is_calibrated_on_a_data_set(normkit, tmp_path):
    model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    code, output, _ = normkit(
        *("convert", "--model", "small-resnet", "--checkpoint", str(tmp_path / "weights.pt")),
        *("--to", "gn:4", "--calibrate", "digits", "--examples", "96", "--batch-size", "32"),
        "--json",
    )
    assert code == 0
    report = json.loads(output)
    assert report["calibration"]["num_batches"] == 3
    assert report["calibration"]["num_layers"] == len(report["changes"]) == 5
    assert report["calibration"]["original"]["relative_error"] == 0


def test_calibrated_standardized_weights_can_be_loaded_again(normkit, tmp_path):
    path = tmp_path / "weights.safetensors"
    code, _, _ = normkit(
        *("convert", "--model", "small-resnet", "--to", "gn:4+ws", "--where", "re:[34].*"),
        *("--calibrate", "digits", "--examples", "32", "--save", str(path)),
    )
    assert code == 0
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["where"] == "re:[34].*"
    names = about["standardized"].split(",")
    model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    nk.convert_norm_(model, {"re:[34].*": "gn:4"})
    nk.standardize_weights_(model, lambda layer, name: name in names, preserve=True)
    model.load_state_dict(load_file(path))


def test_only_the_named_norms_are_converted(normkit):
    code, output, _ = normkit("convert", *SMALL, "--to", "gn:4", "--where", "re:.*0.*, nothing*")
    assert code == 2
    code, output, _ = normkit("convert", *SMALL, "--to", "gn:4", "--where", "re:.*1.*")
    assert code == 0
    assert "left alone, no pattern names it: " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gn:5"), "cannot be converted; nothing was changed"),
        (("--to", "gm:5"), "gm"),
        (("--to", "gn:4", "--save", "weights.pt"), "its name ends in .safetensors"),
        (("--to", "gn:4", "--where", "layer1,,bn"), "write names separated by commas"),
        (("--to", "gn:4", "--num-classes", "0"), "--num-classes was given 0; give 1 or more"),
        (("--to", "gn:4", "--examples", "0"), "--examples was given 0; give 1 or more"),
        (("--to", "gn:4", "--calibrate", "nothing"), "there is no data set 'nothing'"),
        (("--to", "gn:4", "--checkpoint", "nothing.pt"), "nothing.pt cannot be read"),
        (("--to", "gn:4", "--input-shape", "8,8"), "it has channels, height and width"),
    ],
)
def test_misuse_is_said_in_a_line(normkit, arguments, message):
    code, output, errors = normkit("convert", *SMALL, *arguments)
    assert code == 2
    assert output == ""
    assert errors.startswith("normkit: ")
    assert message in errors


def test_validate_prints_findings_and_fails_on_errors(normkit):
    tiny = ("--model", "small-resnet", "--num-classes", "10", "--input-shape", "1,4,4")
    code, output, _ = normkit("validate", *tiny, "--batch-size", "1")
    assert code == 1
    assert output.startswith("error: single values")
    code, output, _ = normkit("validate", *SMALL, "--batch-size", "32")
    assert code == 0
    code, output, _ = normkit("validate", *tiny, "--batch-size", "1", "--json")
    assert {found["severity"] for found in json.loads(output)} >= {"error"}
    code, output, _ = normkit("validate", *SMALL, "--batch-size", "0")
    assert code == 2


def test_recommend_ranks_norms(normkit):
    code, output, _ = normkit("recommend", "--batch-size", "2")
    assert code == 0
    assert output.splitlines()[1].startswith("1  bcn")
    code, output, _ = normkit("recommend", "--batch-size", "64", "--workers", "32", "--details")
    assert output.startswith("bcn")
    assert "evidence: " in output
    code, output, _ = normkit("recommend", "--batch-size", "2", "--json")
    assert [each["spec"] for each in json.loads(output)] == [str(r.spec) for r in nk.recommend(2)]
    code, _, errors = normkit("recommend", "--batch-size", "2", "--workers", "3")
    assert code == 2
    assert "3 workers" in errors


def test_every_option_of_recommend_counts(normkit):
    options = {
        ("--pretrained",): {"pretrained": True},
        ("--task", "detection"): {"task": "detection"},
        ("--workers", "4"): {"per_worker": False, "workers": 4},
    }
    plain = [each.as_dict() for each in nk.recommend(16)]
    for given, meant in options.items():
        _, output, _ = normkit("recommend", "--batch-size", "16", *given, "--json")
        found = json.loads(output)
        assert found == json.loads(json.dumps(nk.recommend(16, **meant).as_list()))
        assert found != json.loads(json.dumps(plain))


def test_options_reach_the_calls_that_they_are_for(normkit):
    _, output, _ = normkit("convert", *SMALL, "--to", "bgn:auto", "--batch-size", "2", "--json")
    assert {change["new"] for change in json.loads(output)["changes"]} == {"bgn:1"}
    arguments = ("validate", *SMALL, "--batch-size", "2", "--json")
    _, training, _ = normkit(*arguments)
    _, evaluation, _ = normkit(*arguments, "--evaluation")
    kinds = [{each["check"] for each in json.loads(text)} for text in (training, evaluation)]
    assert kinds == [{"few examples"}, {"no statistics yet"}]
