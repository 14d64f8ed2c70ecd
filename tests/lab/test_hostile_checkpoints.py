"""Files that are no checkpoints, or bad ones: one sentence, and nothing has changed."""

import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import normkit as nk
from normkit.cli import main
from normkit.errors import DataError
from normkit.lab.checkpoints import Alterations, load_weights_, restored


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nk.BatchNorm(4))


def others(**changed):
    """A state dict that would change every tensor, with some put in others' places."""
    state = {key: torch.full_like(value, 3) for key, value in net().state_dict().items()}
    return state | {key.replace("__", "."): value for key, value in changed.items()}


ODD_TENSORS = {
    "sparse": (lambda: torch.ones(4, 1, 3, 3).to_sparse(), r"not plain: 0.weight \(sparse_coo\)"),
    "meta": (
        lambda: torch.ones(4, 1, 3, 3, device="meta"),
        r"not plain: 0.weight \(without values\)",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(4, 1, 3, 3), 0.1, 0, torch.qint8),
        r"not plain: 0.weight \(quantized\)",
    ),
    "bool": (
        lambda: torch.ones(4, 1, 3, 3, dtype=torch.bool),
        r"0.weight \(bool, the model has float32\)",
    ),
    "int": (
        lambda: torch.ones(4, 1, 3, 3, dtype=torch.int64),
        r"0.weight \(int64, the model has float32",
    ),
    "complex": (
        lambda: torch.ones(4, 1, 3, 3) * 1j,
        r"0.weight \(complex64, the model has float32\)",
    ),
    "fp8": (
        lambda: torch.ones(4, 1, 3, 3).to(torch.float8_e4m3fn),
        r"0.weight \(float8_e4m3fn, the model",
    ),
    "too large": (
        lambda: torch.full((4, 1, 3, 3), 1e300, dtype=torch.float64),
        r"0.weight \(float64, beyond the numbers of float32\)",
    ),
    "shape": (
        lambda: torch.ones(4, 1, 3),
        r"another shape: 0.weight \(\(4, 1, 3\), the model has \(4, 1,",
    ),
    "list": (lambda: [1.0], r"holds other things than tensors: 0.weight"),
    "number": (lambda: 1.0, r"holds other things than tensors: 0.weight"),
}


def assert_refused(path, match):
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match=match) as refused:
        load_weights_(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert str(refused.value).isprintable()
    assert path.name[:20].replace("\0", r"\x00") in str(refused.value)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # on its way out, still in files
@pytest.mark.parametrize(("make", "match"), ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_one_odd_tensor_and_nothing_is_loaded(tmp_path, make, match):
    path = tmp_path / "weights.pt"
    torch.save(others(**{"0__weight": make()}), path)
    assert_refused(path, match)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("1__num_batches_tracked", torch.tensor(2.5), r"num_batches_tracked \(float32, the model"),
        ("1__num_batches_tracked", torch.tensor(torch.inf), "of another kind"),
        ("2__example_weight", torch.tensor(1.5), "not from 0 to 1: 2.example_weight"),
        ("2__example_weight", torch.tensor(torch.nan), "not from 0 to 1: 2.example_weight"),
        ("2__example_weight", torch.tensor(True), r"2.example_weight \(bool, the model has"),
        ("2__example_weight", torch.ones(2), r"2.example_weight \(\(2,\), the model has \(\)\)"),
        ("1__example_weight", torch.tensor(0.5), "unknown to the model: 1.example_weight"),
    ],
)
def test_counts_and_example_weights_have_their_rules(tmp_path, name, value, match):
    path = tmp_path / "weights.pt"
    torch.save(others(**{name: value}), path)
    assert_refused(path, match)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({0: torch.ones(3), "a": torch.ones(3)}, "has 0 as names; the names of weights are texts"),
        ({None: torch.ones(3)}, "has None as names"),
        ({("a", 1): torch.ones(3)}, r"has \('a', 1\) as names"),
        ({"state_dict": {1: torch.ones(3)}}, "has 1 as names"),
        ({"a": {"b": torch.ones(3)}}, "other things than tensors: a"),
        ({"state_dict": {}}, "other things than tensors: nothing"),
        ({}, "other things than tensors: nothing"),
        ([torch.ones(3)], "holds a list; a checkpoint is a state dict"),
        (5, "holds a int; a checkpoint"),
    ],
)
def test_what_is_no_dict_of_named_tensors_is_refused(tmp_path, state, match):
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    assert_refused(path, match)


def test_a_dict_that_holds_itself_ends(tmp_path):
    endless = {"epoch": 3}
    endless["model"] = endless
    torch.save(endless, tmp_path / "weights.pt")
    assert_refused(tmp_path / "weights.pt", "other things than tensors: epoch, model")


def written(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


TWICE = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
LONG_NUMBER = b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        (TWICE, b"\0" * 4, "names a twice"),
        (b"[" * 100_000, b"", "is no checkpoint"),
        (LONG_NUMBER, b"\0" * 4, "is no checkpoint"),
        (b"{}", b"", "other things than tensors: nothing"),
        (b'{"a"', b"", "is no checkpoint"),
        (b"\xff\xfe", b"", "is no checkpoint"),
    ],
    ids=["a name twice", "brackets", "a long number", "nothing", "broken off", "no text"],
)
def test_bad_headers_of_safetensors_are_refused(tmp_path, header, data, match):
    written(tmp_path / "weights.safetensors", header, data)
    assert_refused(tmp_path / "weights.safetensors", match)


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert_refused(path, "is no checkpoint")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_that_break_off_are_refused(tmp_path, name):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(others(), path)
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(path, "is no checkpoint")


def test_what_is_no_file_is_said(tmp_path):
    for suffix in (".pt", ".safetensors"):
        folder = tmp_path / f"folder{suffix}"
        folder.mkdir()
        assert_refused(folder, "is a folder; give a file")
        assert_refused(tmp_path / f"none{suffix}", "cannot be read: No such file")
        assert_refused(tmp_path / f"{'x' * 300}{suffix}", "cannot be read: File name too long")
        assert_refused(tmp_path / f"a\0b{suffix}", "is no name of a file")
    os.mkfifo(tmp_path / "pipe.pt")
    assert_refused(tmp_path / "pipe.pt", "is a device or a pipe")


def test_a_file_without_permission_is_said(tmp_path, monkeypatch):
    """The superuser may read everything, so the system's answer is played."""
    path = tmp_path / "weights.pt"
    torch.save(others(), path)

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("torch.load", denied)
    assert_refused(path, "cannot be read: Permission denied")


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path, capsys):
    names = ["\x1b[31mred\x1b[0m", "two\nlines", "\u202eright to left", "a" * 10_000]
    torch.save(others() | {name: torch.ones(1) for name in names}, tmp_path / "weights.pt")
    assert_refused(tmp_path / "weights.pt", r"unknown to the model: \\x1b\[31mred")
    small = ["--model", "small-resnet", "--num-classes", "10", "--input-shape", "1,8,8"]
    path = str(tmp_path / "weights.pt")
    code = main(["validate", *small, "--batch-size", "2", "--checkpoint", path])
    errors = capsys.readouterr().err
    assert code == 2
    assert "\x1b" not in errors
    assert "\u202e" not in errors
    assert len(errors.splitlines()) == 1
    assert len(errors) < 5000


def test_an_interrupt_while_loading_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model, path = net(), tmp_path / "weights.pt"
    torch.save(others(**{"2__example_weight": torch.tensor(0.5)}), path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load = nn.BatchNorm2d._load_from_state_dict
    calls = []

    def interrupted(*given):
        calls.append(0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return load(*given)

    monkeypatch.setattr(nn.BatchNorm2d, "_load_from_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_weights_(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[2].example_weight == 0


WHOLE_CASTS = {
    "half": lambda value: value.half(),
    "double": lambda value: value.double(),
    "bfloat16": lambda value: value.bfloat16(),
}


@pytest.mark.parametrize("cast", WHOLE_CASTS.values(), ids=WHOLE_CASTS)
def test_a_state_dict_that_was_cast_as_a_whole_is_loaded(tmp_path, cast):
    model = net()
    torch.save({key: cast(value) for key, value in others().items()}, tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    for value in model.state_dict().values():
        assert torch.equal(value, torch.full_like(value, 3))
        assert value.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"model.net.{key}",
        lambda key: key.replace("0.", "0._orig_mod."),
    ],
)
def test_names_of_wrapped_and_compiled_models_are_understood(tmp_path, rename):
    model, state = net(), others()
    torch.save({rename(key): value for key, value in state.items()}, tmp_path / "weights.pt")
    load_weights_(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_wrappers_in_either_order_are_understood(tmp_path):
    for nest in (("model", "state_dict"), ("state_dict", "model")):
        model, state = net(), others()
        torch.save({nest[0]: {nest[1]: state}, "epoch": 2}, tmp_path / "weights.pt")
        load_weights_(model, tmp_path / "weights.pt")
        assert torch.equal(model[0].weight, state["0.weight"])


RECIPES = [
    ({"changes": "[" * 100_000}, r"under 'changes' .* not in JSON"),
    ({"changes": "9" * 5000}, r"under 'changes' .* not in JSON"),
    ({"changes": "fixed a bug"}, r"under 'changes' .* not in JSON"),
    ({"changes": "[1, 2]"}, r"not as names with texts"),
    ({"changes": '{"1": 5}'}, r"not as names with texts"),
    ({"changes": '{"1": "gm:4"}'}, r"do not fit the model: spec 'gm:4' names norm 'gm'"),
    ({"changes": '{"1": "gn:3"}'}, r"(?s)do not fit the model: .*3 groups do not divide"),
    (
        {"changes": '{"1": "gn:' + "9" * 5000 + '"}'},
        r"do not fit the model: a spec of 5003 characters",
    ),
    ({"changes": '{"0": "gn:2"}'}, r"norms that the model does not have: 0; .*; check --model"),
    ({"changes": '{"re:(1+)+x": "gn:2"}'}, r"does not have: re:\(1\+\)\+x; .*; check --model"),
    ({"changes": '{"7": "gn:2"}'}, r"norms that the model does not have: 7; .*; check --model"),
    ({"standardized": "0,7"}, r"convolutions that the model does not have: 7; .*; check --model"),
    ({"weights": '{"0": "wz"}'}, r"weights changed by 'wz' are not known; known: .*'cwn'"),
    ({"weights": '{"1": "wn"}'}, r"the model has no convolutions at 1; check --model"),
    ({"weights": "[1]"}, r"says under 'weights' what its weights .* but not as names with texts"),
    ({"removed": "1,0"}, r"the model has no norms to remove at 0; check --model"),
    ({"standardized": "1"}, r"convolutions that the model does not have: 1; .*; check --model"),
]


@pytest.mark.parametrize(("about", "match"), RECIPES, ids=[match for _, match in RECIPES])
def test_what_a_file_says_of_its_norms_is_checked(tmp_path, about, match):
    path = tmp_path / "weights.safetensors"
    save_file(others(), path, metadata=about)
    with pytest.raises(DataError, match=match) as refused:
        restored(net(), path)
    assert re.search("weights.safetensors says", str(refused.value))
    assert len(str(refused.value)) < 2000


def test_what_a_file_says_twice_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    about = b'{"__metadata__":{"changes":"{}","changes":"{}"}}'
    written(path, about)
    with pytest.raises(DataError, match="names changes twice"):
        Alterations.read(path)


def test_a_long_name_can_be_written_and_a_longer_one_is_refused_in_a_sentence(tmp_path):
    small = ["convert", "--model", "small-resnet", "--num-classes", "10", "--input-shape", "1,8,8"]
    longest = "x" * (255 - len(".safetensors")) + ".safetensors"
    assert main([*small, "--to", "gn:4", "--save", str(tmp_path / longest)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [longest]
    assert main([*small, "--to", "gn:4", "--save", str(tmp_path / f"x{longest}")]) == 2
