"""Checkpoints: read without running code, fitted whole or not at all, written whole or not."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from normkit.errors import DataError
from normkit.lab.checkpoints import load_weights_, save_weights


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))


def other(model):
    return {key: torch.full_like(value, 3) for key, value in model.state_dict().items()}


def assert_holds(model, state):
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model_state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}},
    ],
)
def test_what_training_scripts_save_is_loaded(tmp_path, wrap):
    model = net()
    state = other(model)
    torch.save(wrap(state), tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert_holds(model, state)


def test_safetensors_go_out_and_in(tmp_path):
    model, path = net(), tmp_path / "weights.safetensors"
    model.again = model[1]  # shared tensors have two names
    save_weights(model, path, {"norms": "bn"})
    assert load_file(path).keys() == model.state_dict().keys()
    fresh = net()
    fresh.again = fresh[1]
    load_weights_(fresh, path)
    assert_holds(fresh, model.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_old_checkpoints_without_counts_are_loaded(tmp_path):
    model = net()
    state = other(model)
    count = state.pop("1.num_batches_tracked")
    save_file(state, tmp_path / "weights.safetensors")
    load_weights_(model, tmp_path / "weights.safetensors")
    assert count == 3
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, state["1.running_mean"])


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "plain.pkl"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, name):
    model, path, witness = net(), tmp_path / name, tmp_path / "ran"
    state = dict(model.state_dict(), hook=Hostile(witness))
    if name == "plain.pkl":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    match = "is no checkpoint" if name.endswith("safetensors") else "holds code or objects"
    with pytest.raises(DataError, match=match):
        load_weights_(model, path)
    assert not witness.exists()
    assert_holds(model, before)


def test_what_does_not_fit_is_said_and_changes_nothing(tmp_path):
    model = net()
    state = other(model)
    state["0.weight"] = torch.zeros(4, 3, 3, 3)
    state["2.weight"] = state.pop("1.weight")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(
        DataError,
        match=r"missing: 1.weight; unknown to the model: 2.weight; of another shape: 0.weight "
        r"\(\(4, 3, 3, 3\), the model has \(4, 1, 3, 3\)\).*--num-classes",
    ):
        load_weights_(model, tmp_path / "weights.pt")
    assert_holds(model, before)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    files = {"empty.pt": b"", "text.pt": b"hello there", "text.safetensors": b"hello there"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} .*"):
            load_weights_(net(), tmp_path / name)
    with pytest.raises(DataError, match=r"nothing\.pt cannot be read: No such file"):
        load_weights_(net(), tmp_path / "nothing.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(DataError, match="holds a Tensor; a checkpoint is a state dict"):
        load_weights_(net(), tmp_path / "tensor.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(DataError, match="other things than tensors: epoch"):
        load_weights_(net(), tmp_path / "epoch.pt")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def broken(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("normkit.lab.checkpoints.writing.save_file", broken)
    with pytest.raises(
        DataError, match=r"cannot be read or written \(disk full\); .* another one with --save"
    ):
        save_weights(net(), path, {})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
