"""`normkit compare` with a user's own network, pictures and training function."""

import json
import re
import shutil
import tomllib

import pytest
from PIL import Image

from normkit.cli import main
from pictures import fill

MY = '''
import timm
import torch
from torch import nn


class Net(nn.Module):
    """A network of timm's with a head of one's own, whose norm is torch's."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = timm.create_model("test_resnet", num_classes=0)
        self.norm = nn.BatchNorm1d(self.body.num_features)
        self.head = nn.Linear(self.body.num_features, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def make_model():
    return Net(2)


def no_model():
    return "a model"


def make_datasets():
    pictures = torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8)
    dataset = torch.utils.data.TensorDataset(pictures, torch.arange(60) % 3)
    return {"train": dataset, "test": dataset}


def train(apply_norm, batch_size, seed, report):
    torch.manual_seed(seed)
    net = apply_norm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    loss = net(torch.randn(batch_size, 4)).square().mean()
    report(loss=loss.item())
    return {"loss": loss.item()}
'''
SMALL = ["--norms", "bn,gn:4", "--batch-sizes", "4", "--seeds", "1,2", "--workers", "1"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a Python file and 200 pictures, which is the working directory."""
    (tmp_path / "my.py").write_text(MY)
    fill(tmp_path / "photos", per_class=100, size=(16, 16))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(capsys, *arguments):
    code = main(["compare", *arguments, "--json"])
    output, errors = capsys.readouterr()
    return code, json.loads(output), errors


def test_a_network_and_pictures_of_ones_own_with_a_recipe(mine, capsys):
    arguments = [
        "--model", "my.py:make_model", "--data", "folder:photos", *SMALL, "--epochs", "1",
        "--precision", "bf16-mixed", "--accumulate", "2", "--schedule", "cosine",
        "--warmup", "0.5", "--augment", "crop,flip", "--save-weights", "--out", "out",
    ]  # fmt: skip
    code, result, _ = compare(capsys, *arguments)
    assert code == 0
    assert [cell["num_finished"] for cell in result["cells"]] == [2, 2]
    assert result["verdict"]["lines"]
    lines = (mine / "out" / "records.jsonl").read_text().splitlines()
    outcomes = [json.loads(line)["outcome"] for line in lines]
    assert {outcome["num_steps"] for outcome in outcomes} == {18}  # 144 pictures, 8 a step
    names = {place["name"] for place in outcomes[0]["norms"]}
    assert {"norm", "body.bn1"} <= names
    written = tomllib.loads((mine / "out" / "experiment.toml").read_text())
    assert (written["precision"], written["accumulate"]) == ("bf16-mixed", 2)
    assert (written["out"], written["save_weights"]) == (str(mine / "out"), True)
    again = compare(capsys, "--config", "out/experiment.toml", "--no-save-weights")
    assert again[1]["cells"] == result["cells"]
    assert (mine / "out" / "records.jsonl").read_text().splitlines() == lines
    (weights,) = (mine / "out" / "weights").glob("bn-b4-s1-*")
    for command in (
        ["tune", "--data", "./photos", "--examples", "20"],
        ["diagnose", "--train-data", "photos", "--test-data", "folder:photos"],
        ["validate", "--batch-size", "4", "--input-shape", "3,16,16", "--num-classes", "2"],
        ["convert", "--to", "gn:4", "--calibrate", "folder:photos", "--save", "c.safetensors"],
    ):
        given = [*command, "--model", "my.py:make_model", "--checkpoint", str(weights), "--json"]
        assert main(given) in (0, 1)
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("text", ["./photos", "photos", "folder:photos", "{mine}/photos"])
def test_a_folder_is_the_same_data_however_it_is_written(mine, capsys, text):
    text = text.format(mine=mine)
    code, result, _ = compare(
        capsys, "--model", "mlp:depth=2:width=8", "--data", text, "--norms", "bn", "--seeds", "1",
        "--batch-sizes", "8", "--epochs", "1", "--workers", "1", "--out", "out",
    )  # fmt: skip
    assert code == 0
    assert result["cells"][0]["num_finished"] == 1
    written = tomllib.loads((mine / "out" / "experiment.toml").read_text())
    assert written["data"] == f"folder:{mine / 'photos'}"


def test_a_training_of_ones_own(mine, capsys):
    code, result, _ = compare(
        capsys, "--train", "my.py:train", "--better", "lower", *SMALL, "--out", "out"
    )
    assert code == 0
    assert (result["metric"], result["higher_is_better"]) == ("loss", False)
    assert result["verdict"]["is_share"] is False
    page = (mine / "out" / "report.html").read_text()
    assert "Scores: loss" in page
    assert "my.py:train" in page
    assert "learning curves" not in page.lower()


def test_data_sets_of_ones_own(mine, capsys):
    code, result, _ = compare(
        capsys, "--model", "mlp:depth=2:width=8", "--data", "my.py:make_datasets",
        "--norms", "bn", "--batch-sizes", "4", "--seeds", "1", "--epochs", "1", "--workers", "1",
        "--out", "out",
    )  # fmt: skip
    assert code == 0
    assert result["cells"][0]["num_finished"] == 1


def test_the_file_says_how_runs_are_done_and_the_command_line_wins(mine, capsys):
    (mine / "exp.toml").write_text(
        'train = "my.py:train"\nnorms = "bn"\nbatch_sizes = 4\nseeds = [1]\nworkers = 1\n'
        'loggers = "csv"\nout = "there"\nsave_weights = true\ncheckpoint-seconds = 5\n'
    )
    code, _, _ = compare(capsys, "--config", "exp.toml", "--no-save-weights", "--loggers", "")
    assert code == 0
    written = tomllib.loads((mine / "there" / "experiment.toml").read_text())
    found = {n: written[n] for n in ("workers", "loggers", "save_weights", "checkpoint_seconds")}
    assert found == {"workers": 1, "loggers": [], "save_weights": False, "checkpoint_seconds": 5}
    assert not (mine / "there" / "logs").exists()
    assert main(["compare", "--config", str(mine / "there" / "experiment.toml")]) == 0
    page = re.sub("</?span>", "", (mine / "there" / "report.html").read_text())
    assert f"--out {mine / 'there'}" in page


def test_the_other_commands_take_the_same_model_and_data(mine, capsys):
    own = ["--model", "my.py:make_model", "--data", "folder:photos"]
    out = ["--out", "runs/first", "--save-weights", "--norms", "bn", "--batch-sizes", "8"]
    assert compare(capsys, *own, *out, "--seeds", "1", "--epochs", "1", "--workers", "1")[0] == 0
    (weights,) = (mine / "runs/first/weights").glob("*.safetensors")
    trained = [*own, "--checkpoint", str(weights)]
    assert main(["validate", *trained, "--batch-size", "8"]) == 0
    assert main(["convert", *trained, "--to", "gn:4"]) == 0
    assert "converted" in capsys.readouterr().out
    assert main(["tune", *trained, "--examples", "20"]) == 0
    assert main(["diagnose", *trained, "--examples", "20"]) in (0, 1)
    page = (mine / "runs/diagnose/report.html").read_text()
    assert "my.py:make_model on folder:photos" in page
    for command in ("tune", "diagnose"):
        assert main([command, "--model", "my.py:make_model", "--checkpoint", str(weights)]) == 2
        assert "--data" in capsys.readouterr().err


def test_the_other_commands_take_the_size_of_the_pictures(mine, capsys):
    """A network whose first layer fits pictures of 12 by 12 only."""
    own = ["--model", "mlp:depth=2:width=8", "--data", "./photos", "--image-size", "12"]
    out = ["--out", "small", "--save-weights", "--norms", "bn", "--batch-sizes", "8"]
    assert compare(capsys, *own, *out, "--seeds", "1", "--epochs", "1", "--workers", "1")[0] == 0
    (weights,) = (mine / "small/weights").glob("*.safetensors")
    trained = [*own, "--checkpoint", str(weights)]
    assert main(["validate", *trained, "--batch-size", "8"]) == 0
    assert main(["convert", *trained, "--to", "gn:4", "--calibrate", "./photos"]) == 0
    assert main(["tune", *trained, "--examples", "20"]) == 0
    assert main(["diagnose", *trained, "--examples", "20"]) in (0, 1)
    capsys.readouterr()
    other = ["validate", *trained, "--batch-size", "8", "--image-size", "16"]
    assert main(other) == 2  # the weights are of another size
    assert "(8, 432), the model has (8, 768)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--data", "digits", "--image-size", "12"],
            r"--image-size was given 12, but digits has",
        ),
        (["--image-size", "12"], r"--image-size was given 12 without --data, .* 3,12,12"),
        (["--data", "./photos", "--image-size", "0"], r"--image-size was given 0; give 1 or more"),
    ],
)
def test_a_size_that_has_no_use_is_refused(mine, capsys, given, said):
    arguments = ["validate", "--model", "mlp:depth=2:width=8", "--batch-size", "8"]
    assert main([*arguments, *given]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_dry_run_writes_nothing(mine, capsys):
    code, cells, _ = compare(
        capsys, "--model", "my.py:make_model", "--data", "folder:photos", *SMALL, "--dry-run",
        "--epochs", "3", "--out", "out",
    )  # fmt: skip
    assert code == 0
    assert [cell["num_steps"] for cell in cells] == [108, 108]
    assert not (mine / "out").exists()
    assert main(["compare", "--data", "folder:photos", *SMALL, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("Nothing was trained.\n")
    assert main(["compare", "--loggers", "pen", "--dry-run"]) == 2  # as it would be without it
    assert "no logger 'pen'" in capsys.readouterr().err


def test_a_dry_run_of_ones_own_training_knows_its_time_when_it_was_run_once(mine, capsys):
    own = ["--train", "my.py:train", "--norms", "bn,ln", "--batch-sizes", "4", "--out", "out"]
    code, cells, _ = compare(capsys, *own, "--seeds", "1,2,3", "--dry-run")
    assert code == 0
    assert [(cell["norm"], cell["num_runs"], cell["duration_s"]) for cell in cells] == [
        ("bn", 3, None), ("ln", 3, None)
    ]  # fmt: skip
    assert not (mine / "out").exists()
    assert main(["compare", *own, "--seeds", "1,2,3", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "Only the function knows its steps" in output
    assert "\nbn        4     3            \N{EN DASH}" in output
    compare(capsys, *own, "--seeds", "1", "--workers", "1")
    lines = (mine / "out" / "records.jsonl").read_text().splitlines()
    took = {r["spec"]["norm"]: r["duration_s"] for r in map(json.loads, lines)}
    _, cells, _ = compare(capsys, *own, "--seeds", "1,2,3", "--dry-run")
    assert [cell["duration_s"] for cell in cells] == [3 * took["bn"], 3 * took["ln"]]
    assert [cell["num_steps"] for cell in cells] == [1, 1]
    (mine / "my.py").write_text(MY + "# edited\n")  # which makes other runs
    _, cells, _ = compare(capsys, *own, "--seeds", "1,2,3", "--dry-run")
    assert [cell["duration_s"] for cell in cells] == [None, None]


def test_pictures_that_do_not_decode_are_told_and_the_rest_is_used(mine, capsys):
    (mine / "photos" / "cat" / "7.png").write_bytes(b"nothing")
    code, result, errors = compare(
        capsys, "--model", "mlp:depth=2:width=8", "--data", "folder:photos", "--norms", "bn",
        "--batch-sizes", "4", "--seeds", "1", "--epochs", "1", "--workers", "1", "--out", "out",
    )  # fmt: skip
    assert code == 0
    said = "1 picture cannot be read and is left out: cat/7.png"
    assert said in errors
    assert result["notes"] == [said]
    assert f"<b>Note:</b> {said}" in (mine / "out" / "report.html").read_text()


def test_a_class_folder_that_is_gone_is_told_where_the_result_is(mine, capsys):
    given = [
        "--model", "mlp:depth=2:width=8", "--data", "./photos", "--norms", "bn", "--seeds", "1",
        "--batch-sizes", "4", "--epochs", "1", "--workers", "1", "--out", "out",
    ]  # fmt: skip
    fill(mine / "photos", per_class=20, classes=("cow",), size=(16, 16))
    assert compare(capsys, *given)[1]["notes"] == []
    shutil.rmtree(mine / "photos" / "cow")
    note = (
        "1 of these runs has earlier records of other data, which are kept and left out; it is run "
        "anew"
    )
    assert compare(capsys, *given)[1]["notes"] == [note]
    assert main(["compare", *given]) == 0
    assert f"\nnote: {note}\n" in capsys.readouterr().out


def spoil(mine):
    (mine / "other").mkdir()
    fill(mine / "other" / "train")
    fill(mine / "other" / "test", classes=("cat", "cow"))
    (mine / "empty").mkdir()
    (mine / "broken.py").write_text("import torch\nmodel = undefined\n")
    (mine / "plain.py").write_text(
        "from torch import nn\n\ndef make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(768, 2))\n"
    )
    Image.new("RGB", (16, 16)).save(mine / "photos" / "cat" / "new.png")


BAD = {
    "does not import": (
        ["--model", "broken.py:make"],
        r"broken.py cannot be imported: NameError: name 'undefined' .*\(broken.py, line 2\)",
    ),
    "no module": (["--model", "my.py:no_model"], r"my.py:no_model gave a str; it must return an"),
    "no function": (["--model", "my.py:nothing"], r"my.py has no such function; it has Net, make_"),
    "no norm": (
        ["--model", "plain.py:make"],
        r"plain.py:make' has no norm to replace, only Flatten, Linear; .* or choose a model that",
    ),
    "classes differ": (["--data", "folder:other"], r"cow, dog are in only one of them; give both"),
    "empty folder": (["--data", "folder:empty"], r"needs a folder of pictures for each class"),
    "no folder": (["--data", "folder:absent"], r"absent is not a folder"),
    "no path": (
        ["--data", "./absent"],
        r"absent is not a folder; give one with a folder per class",
    ),
    "no name": (
        ["--data", "absent"],
        r"no data set 'absent'; known are digits, .* as ./PATH or folder:PATH, and FILE.py:FUNC",
    ),
    "larger batch": (["--batch-sizes", "400"], r"--batch-sizes was given 400, but photos has 145 "),
    "precision": (["--precision", "16-mixed"], r"16-mixed needs a GPU; on the CPU give bf16-mixed"),
    "logger": (["--loggers", "pen"], r"no logger 'pen'; known are tensorboard, csv, wandb, mlflow"),
    "augmentation": (["--augment", "spin"], r"--augment was given 'spin'; known are crop, flip"),
    "number": (["--clip", "much"], r"--clip was given 'much'; write numbers"),
    "both lengths": (["--epochs", "1", "--steps", "5"], r"epochs=1 and steps=5; give one of them"),
    "on and off": (["--compile", "--no-compile"], r"--compile and --no-compile were both given"),
    "data workers": (["--data-workers", "-1"], r"--data-workers was given -1: .*; give 0 to 1024"),
    "config": (["--config", "absent.toml"], r"absent.toml cannot be read"),
    "weights": (["--weights", "absent.safetensors"], r"absent.safetensors cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(mine, capsys, name):
    spoil(mine)
    arguments, said = BAD[name]
    given = ["--model", "my.py:make_model", "--data", "folder:photos", *SMALL, "--out", "out"]
    code = main(["compare", *given, *arguments])
    output, errors = capsys.readouterr()
    assert (code, output) == (2, "")
    assert re.search(said, errors), errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    assert not (mine / "out").exists()
