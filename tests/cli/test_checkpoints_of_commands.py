"""Every command reads what another command has saved."""

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import normkit as nk
from normkit.cli import main
from normkit.cli.model import ModelOptions
from normkit.lab import Recipe, compare
from normkit.lab.arms import ARMS
from normkit.lab.changes import WEIGHTS
from normkit.lab.checkpoints import save_weights
from normkit.lab.checkpoints.reading import read_metadata
from normkit.lab.models import build_model

MODEL = ("--model", "small-resnet")
TASK = ("--num-classes", "10", "--input-shape", "1,8,8")
FEW = ("--data", "digits", "--examples", "60", "--batch-size", "20")


def convert(to, *more):
    return lambda before, path: ("convert", *TASK, *before, "--to", to, *more, "--save", path)


def tune(*more):
    return lambda before, path: ("tune", *FEW, *before, *more, "--save", path)


CALIBRATED = ("--calibrate", "digits", "--examples", "32")
CHAINS = {
    "converted": [convert("gn:4")],
    "in part, calibrated, standardised": [convert("gn:4+ws", "--where", "3.*", *CALIBRATED)],
    "tuned": [tune()],
    "tuned by layer": [tune("--per-layer")],
    "standardised, then tuned": [convert("bn+ws"), tune()],
    "to a composite, then tuned": [convert("bcn:4", "--where", "4.*"), tune()],
    "tracked groups, tuned": [convert("gn:4:track_running_stats"), tune()],
    "tuned, then converted": [tune(), convert("gn:4", "--where", "3.norm1")],
    "converted twice": [convert("gn:4", "--where", "3.*"), convert("bcn:8+ws", "--where", "4.*")],
}


@pytest.fixture
def normkit(capsys):
    def run(*arguments):
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def saved(monkeypatch):
    """The models that commands save, in evaluation mode."""
    models = []

    def save(model, path, metadata):
        models.append(copy.deepcopy(model).eval())
        save_weights(model, path, metadata)

    for command in ("convert", "tune"):
        monkeypatch.setattr(f"normkit.cli.{command}.save_weights", save)
    return models


def readers(path, folder, model=MODEL[1]):
    small = ("--model", model, "--checkpoint", path)
    return [
        ("convert", *small, *TASK, "--to", "in", "--save", str(folder / "again.safetensors")),
        ("validate", *small, *TASK, "--batch-size", "8"),
        ("tune", *small, *FEW),
        (
            *("diagnose", *small, "--train-data", "digits", "--test-data", "digits"),
            *("--examples", "64", "--checkpoints", path, "--out", str(folder / "out")),
        ),
    ]


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_every_command_reads_what_the_others_have_saved(
    normkit, trained, tmp_path, monkeypatch, saved, chain
):
    monkeypatch.setattr("normkit.tune.gradient.NUM_STEPS", 2)
    before = (*MODEL, "--checkpoint", trained)
    for number, write in enumerate(chain):
        path = str(tmp_path / f"{number}.safetensors")
        code, _, errors = normkit(*write(before, path))
        assert code == 0, errors
        before = (*MODEL, "--checkpoint", path)
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(options(path).build()(x), saved[-1](x))
    for command in readers(path, tmp_path):
        code, _, errors = normkit(*command)
        has_statistics = any(key.endswith("running_mean") for key in load_file(path))
        if command[0] == "tune" and not has_statistics:
            assert "nothing to weigh" in errors
        else:
            assert code in (0, 1), errors
            assert "normkit:" not in errors


SHAPE = {"num_classes": 10, "input_shape": (1, 8, 8)}
ARM_MODEL = "wide-resnet:depth=10:width=1"
SAVED_ARMS = [
    "bn", "gn:4", "none", "frozen-bn", "four-things", "ibn-a", "ibn-b", "xbn/gn:4", "xbn-p1/gn:4",
    "xbn-d2/gn:4", "gnbn/gn:4", "none+wn", "ibn-b+cwn", *(f"gn:4+{ending}" for ending in WEIGHTS),
]  # fmt: skip


@pytest.fixture(scope="module")
def weights_of_arms(tmp_path_factory):
    """What `compare --save-weights` writes, by arm."""
    folder = tmp_path_factory.mktemp("arms")
    compare(
        ARM_MODEL, norms=SAVED_ARMS, batch_sizes=8, seeds=1, recipe=Recipe(steps=3), limit=60,
        save_weights=True, workers=1, out=folder,
    )  # fmt: skip
    return {read_metadata(path)["norm"]: path for path in (folder / "weights").iterdir()}


def test_every_arm_is_among_those_that_are_saved():
    kinds = {re.sub(r"NORM|P|K", "", arm).strip("/") for arm in ARMS}
    saved = {re.sub(r"gn:4|\d", "", arm).strip("/") for arm in SAVED_ARMS}
    assert kinds <= saved


@pytest.mark.parametrize("arm", SAVED_ARMS)
def test_weights_of_every_arm_are_loaded_by_the_file_alone(weights_of_arms, arm):
    path = weights_of_arms[arm]
    state = load_file(path)
    expected = build_model(ARM_MODEL, norm=arm, batch_size=8, seed=5, **SHAPE).model
    expected.load_state_dict(state)
    found = options(path, ARM_MODEL).build()
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(x), expected.eval()(x))
    assert found.state_dict().keys() == state.keys()


@pytest.mark.parametrize("arm", ["none+wn", "xbn/gn:4", "gn:4+ws:center"])
def test_every_command_reads_weights_of_an_arm(weights_of_arms, normkit, tmp_path, arm):
    for command in readers(str(weights_of_arms[arm]), tmp_path, ARM_MODEL):
        code, _, errors = normkit(*command)
        if command[0] == "tune" and arm != "xbn/gn:4":
            assert "nothing to weigh" in errors
        elif command[0] == "convert" and arm == "none+wn":
            assert "no norm" in errors
        else:
            assert code in (0, 1), errors
            assert "normkit:" not in errors


@pytest.mark.parametrize("arm", ["ibn-b+cwn", "gn:4+ws:scale"])
def test_weights_of_an_arm_can_be_converted_and_then_started_from(weights_of_arms, tmp_path, arm):
    """What the first file says is still said by the next ones."""
    first, second = str(weights_of_arms[arm]), str(tmp_path / "second.safetensors")
    given = ("--model", ARM_MODEL, *TASK, "--checkpoint", first, "--to", "gn:2", "--save", second)
    assert main(["convert", *given]) == 0
    compare(
        ARM_MODEL, norms="gn:8", batch_sizes=8, seeds=1, recipe=Recipe(steps=1), limit=60,
        save_weights=True, workers=1, out=tmp_path, weights=second,
    )  # fmt: skip
    (third,) = (tmp_path / "weights").iterdir()
    for path in (second, third):
        found = options(path, ARM_MODEL).build()
        assert all(torch.equal(found.state_dict()[k], v) for k, v in load_file(path).items())
    norms = {m.num_groups for m in found.modules() if isinstance(m, nk.GroupNorm)}
    assert norms == {8}


def options(path, model="small-resnet"):
    return ModelOptions(model=model, num_classes=10, input_shape="1,8,8", checkpoint=Path(path))


def test_a_tuned_model_comes_back_with_its_example_weights(normkit, trained, tmp_path):
    path = tmp_path / "tuned.safetensors"
    code, output, _ = normkit("tune", *MODEL, *FEW, "--checkpoint", trained, "--save", str(path))
    assert code == 0
    assert "alpha is set to" in output
    expected = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    nk.convert_norm_(expected, "bn")
    expected.load_state_dict(load_file(path))
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = options(trained).build()
    assert torch.equal(options(path).build()(x), expected.eval()(x))
    assert not torch.allclose(plain(x), expected(x), atol=1e-3)


@pytest.mark.parametrize("name", ["tuned.pt", "tuned.safetensors"])
def test_what_was_tuned_by_the_library_is_read_too(tmp_path, name):
    model = build_model("small-resnet", num_classes=10, input_shape=(1, 8, 8)).model
    nk.convert_norm_(model, "bn", where=lambda _, at: at.startswith("3."))
    nk.set_example_weight(model, 0.25)
    state, path = model.state_dict(), tmp_path / name
    save = save_file if name.endswith("safetensors") else torch.save
    save({f"module.{key}": value for key, value in state.items()}, path)
    found = options(path).build()
    assert found.state_dict().keys() == state.keys()
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(x), model.eval()(x))


def test_a_plain_checkpoint_may_be_earlier_than_a_tuned_one_and_the_other_way(
    normkit, trained, tmp_path
):
    tuned = str(tmp_path / "tuned.safetensors")
    assert normkit("tune", *MODEL, *FEW, "--checkpoint", trained, "--save", tuned)[0] == 0
    data = ("--train-data", "digits", "--test-data", "digits", "--examples", "64")
    for now, earlier in ((tuned, trained), (trained, tuned)):
        code, _, errors = normkit(
            *("diagnose", *MODEL, *data, "--checkpoint", now, "--checkpoints", earlier),
            *("--out", str(tmp_path / "out")),
        )
        assert code in (0, 1), errors
