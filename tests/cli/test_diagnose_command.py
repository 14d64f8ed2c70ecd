"""`normkit diagnose`."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from normkit.cli import main
from normkit.lab.data import load
from normkit.lab.models import build_model

DIGITS = ("--train-data", "digits", "--test-data", "digits")
SMALL = ("--model", "small-resnet", "--examples", "256")


@pytest.fixture
def normkit(capsys):
    """Run the command; returns the exit code, the output and the errors."""

    def run(*arguments):
        code = main(["diagnose", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A network that has learned a little, and the same with wrong statistics."""
    data = load("digits").train
    torch.manual_seed(0)
    model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = torch.arange(1280).split(32) * 2
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, len(steps))
    for index in steps:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.inputs[index]), data.targets[index]).backward()
        optimizer.step()
        schedule.step()
    folder = tmp_path_factory.mktemp("weights")
    torch.save(model.state_dict(), folder / "good.pt")
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(40)
    torch.save(model.state_dict(), folder / "wrong.pt")
    return folder


def test_a_wrong_checkpoint_is_diagnosed_and_reported(normkit, checkpoints, tmp_path):
    out = tmp_path / "new" / "folder"
    code, output, _ = normkit(
        *(*SMALL, *DIGITS, "--checkpoint", str(checkpoints / "wrong.pt"), "--out", str(out)),
        *("--checkpoints", str(checkpoints / "good.pt"), "--try"),
    )
    assert code == 1
    assert output.startswith(
        "Thawed statistics: weight and bias of 5 layers are those of the first"
    )
    assert output.endswith(f"report: {out / 'report.html'}\n")
    found = json.loads((out / "diagnosis.json").read_text())
    assert found["causes"][0]["name"] == "thawed statistics"
    assert (found["num_train"], found["num_judged"]) == (256, 256)
    assert [each["name"] for each in found["over_training"]] == ["good", "now"]
    recalibrated = next(trial for trial in found["trials"] if trial["name"] == "recalibrate")
    assert recalibrated["gain"]["low"] > 0
    page = (out / "report.html").read_text()
    assert "small-resnet on digits" in page
    assert "--try" in page


def test_a_good_checkpoint_is_healthy(normkit, checkpoints, tmp_path):
    code, output, _ = normkit(
        *(*SMALL, *DIGITS, "--checkpoint", str(checkpoints / "good.pt"), "--json"),
        *("--out", str(tmp_path)),
    )
    assert code == 0
    assert json.loads(output)["causes"] == []


def test_data_may_be_files(normkit, checkpoints, tmp_path):
    digits = load("digits")
    for name, part in (("train", digits.train), ("test", digits.test)):
        shift = 2.0 if name == "test" else 0.0
        tensors = {"inputs": part.inputs + shift, "targets": part.targets.int()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("train", "test")]
    data = ("--train-data", files[0], "--test-data", files[1])
    good = ("--checkpoint", str(checkpoints / "good.pt"))
    code, output, _ = normkit(*SMALL, *data, *good, "--json", "--out", str(tmp_path))
    assert code == 1
    assert json.loads(output)["causes"][0]["name"] == "shifted test data"


def test_checkpoints_of_one_name_are_told_apart(normkit, checkpoints, tmp_path):
    paths = [tmp_path / "first" / "model.pt", tmp_path / "second" / "model.pt"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes((checkpoints / "good.pt").read_bytes())
    good = ("--checkpoint", str(checkpoints / "good.pt"), "--out", str(tmp_path))
    several = ("--checkpoints", ",".join(map(str, paths)), "--json")
    small = ("--model", "small-resnet", "--examples", "9")
    code, output, _ = normkit(*small, *DIGITS, *good, *several)
    assert code in (0, 1)
    found = json.loads(output)
    assert [each["name"] for each in found["over_training"]] == [*map(str, paths), "now"]
    assert found["num_judged"] == 9


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"inputs": torch.zeros(2, 1, 8, 8)}, "holds inputs, and no targets; write it by"),
        (
            {"inputs": torch.zeros(2, 64), "targets": torch.zeros(2, dtype=torch.int64)},
            r"holds inputs torch.float32 \(2, 64\), targets torch.int64 \(2,\); write it by",
        ),
        (
            {"inputs": torch.zeros(2, 1, 8, 8), "targets": torch.zeros(2)},
            r"targets torch.float32 \(2,\); write it by",
        ),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tensors, said, normkit, checkpoints, tmp_path):
    path = tmp_path / "data.safetensors"
    if tensors is not None:
        save_file(tensors, path)
    code, _, errors = normkit(
        *(*SMALL, "--train-data", str(path), "--test-data", "digits", "--out", str(tmp_path)),
        *("--checkpoint", str(checkpoints / "good.pt")),
    )
    assert code == 2
    assert re.search(said, errors)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--examples", "0"), "--examples was given 0; give 1 or more"),
        (("--batch-size", "0"), "--batch-size was given 0; give 1 or more"),
        (("--checkpoints", "none.pt"), "none.pt cannot be read"),
        (("--test-data", "emnist"), "there is no data set 'emnist'"),
        (("--image-size", "9"), "--image-size was given 9, but digits has a size of its own"),
        (
            ("--train-data", "a.safetensors", "--test-data", "b.safetensors", "--image-size", "9"),
            "but the inputs of .safetensors files have a size of their own; leave it out",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(options, said, normkit, checkpoints, tmp_path):
    good = ("--checkpoint", str(checkpoints / "good.pt"), "--out", str(tmp_path))
    code, _, errors = normkit(*SMALL, *DIGITS, *good, *options)
    assert code == 2
    assert said in errors


def test_random_weights_are_not_diagnosed(normkit, tmp_path):
    code, _, errors = normkit(*SMALL, *DIGITS, "--out", str(tmp_path))
    assert code == 2
    assert "--checkpoint is missing; give the file with the trained weights" in errors


def test_one_file_is_not_both(normkit, checkpoints, tmp_path):
    path = str(tmp_path / "x.safetensors")
    good = ("--checkpoint", str(checkpoints / "good.pt"), "--out", str(tmp_path))
    code, _, errors = normkit(*SMALL, "--train-data", path, "--test-data", path, *good)
    assert code == 2
    assert "was not trained on" in errors
