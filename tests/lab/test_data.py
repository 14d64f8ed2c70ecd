import gzip
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from normkit.errors import DataError, SpecError
from normkit.lab.data import READERS, load, read_examples, sources, stratified_order
from normkit.lab.data.dataset import fingerprint_of
from normkit.lab.data.detection import COCO
from normkit.lab.data.frames import SOMETHING
from normkit.lab.data.idx import read_idx
from normkit.lab.data.known import data_text
from normkit.lab.data.opening import forget_data


@pytest.fixture(autouse=True)
def fresh_cache():
    forget_data()
    yield
    forget_data()


def rows(examples):
    return {tuple(row) for row in examples.inputs.flatten(1).tolist()}


def test_digits_are_split_into_three_disjoint_sets_that_hold_everything():
    digits = load("digits")
    parts = [digits.train, digits.validation, digits.test]
    assert sum(map(len, parts)) == 1797
    assert len(rows(digits.train) | rows(digits.validation) | rows(digits.test)) == 1797


def test_every_set_holds_the_classes_in_their_proportions():
    digits = load("digits")
    for part in (digits.train, digits.validation, digits.test):
        counts = part.targets.bincount(minlength=10)
        assert (counts - len(part) / 10).abs().max() <= 0.03 * len(part)


def test_training_inputs_are_normalised_by_their_own_statistics():
    digits = load("digits")
    assert digits.train.inputs.mean().abs() < 1e-5
    assert (digits.train.inputs.std(correction=0) - 1).abs() < 1e-5
    assert digits.test.inputs.mean().abs() > 1e-5  # not by the test set's


def test_a_limit_keeps_training_examples_and_leaves_the_test_set_alone():
    everything, some = load("digits"), load("digits", 100)
    assert len(some.train) == 100
    assert len(some.validation) == 11
    assert torch.equal(some.test.targets, everything.test.targets)
    assert some.train.targets.bincount().max() - some.train.targets.bincount().min() <= 2


def test_a_limit_above_the_size_changes_nothing():
    assert torch.equal(load("digits", 10**6).train.inputs, load("digits").train.inputs)


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_every_prefix_of_a_stratified_order_is_in_proportion(labels, seed):
    targets = torch.tensor(labels)
    order = stratified_order(targets, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    num_classes = len(set(labels))
    for end in range(1, len(labels) + 1):
        for label in set(labels):
            share = labels.count(label) * end / len(labels)
            found = (targets[order[:end]] == label).sum().item()
            assert abs(found - share) <= 0.5 * num_classes + 0.5


def test_a_rare_class_is_spread_evenly():
    targets = torch.tensor([0] * 90 + [1] * 10)
    order = stratified_order(targets, 3)
    assert targets[order].view(10, 10).sum(1).tolist() == [1] * 10


def test_an_unknown_data_set_lists_the_known_ones():
    with pytest.raises(SpecError, match=r"no data set 'emnist'; known are digits, fashion-mnist,"):
        load("emnist")


def test_a_reader_cannot_be_registered_twice():
    with pytest.raises(SpecError, match=r"'digits' already has a reader: digits"):
        sources.reader("digits")(sources.digits)


def write_idx(path, array, header=None):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress((header or head) + array.tobytes()))


def test_idx_files_are_read(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "x.gz", array)
    assert torch.equal(read_idx(tmp_path / "x.gz"), torch.from_numpy(array))


def test_a_missing_idx_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.gz cannot be read \(.*No such file.*copy the f"):
        read_idx(tmp_path / "absent.gz")


def test_a_file_that_is_not_idx_says_how_it_begins(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"abcdefgh"))
    with pytest.raises(DataError, match=r"begins with 61 62 63 64, but .* begins with 00 00 08"):
        read_idx(tmp_path / "x.gz")


def test_a_cut_idx_file_says_what_is_missing(tmp_path):
    write_idx(tmp_path / "x.gz", np.zeros(5, np.uint8), bytes([0, 0, 8, 1, 0, 0, 0, 9]))
    with pytest.raises(DataError, match=r"holds 5 values, but its header says \(9,\)"):
        read_idx(tmp_path / "x.gz")


@pytest.mark.parametrize("axes", [2, 255])
def test_an_idx_file_that_ends_in_its_header_is_an_error_too(tmp_path, axes):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, axes]) + b"\1\0\0"))
    with pytest.raises(DataError, match="ends in the middle of its header; copy the file again"):
        read_idx(path)


def examples(**changed):
    given = {"inputs": torch.zeros(3, 1, 4, 4), "targets": torch.tensor([0, 2, 1])}
    return {**given, **changed}


BAD_EXAMPLES = {
    "no targets": ({"targets": None}, "holds inputs, and no targets; write it by"),
    "no images": ({"inputs": torch.zeros(0, 1, 4, 4), "targets": torch.tensor([])}, "holds inputs"),
    "three axes": ({"inputs": torch.zeros(3, 4, 4)}, r"holds inputs torch.float32 \(3, 4, 4\)"),
    "bytes": ({"inputs": torch.zeros(3, 1, 4, 4, dtype=torch.uint8)}, "inputs torch.uint8"),
    "fp8": ({"inputs": torch.zeros(3, 1, 4, 4).to(torch.float8_e5m2)}, "torch.float8_e5m2"),
    "bool": ({"targets": torch.tensor([True, False, True])}, "targets torch.bool"),
    "negative": ({"targets": torch.tensor([0, -1, 2])}, "classes from -1 to 2; they are counted"),
    "huge": ({"targets": torch.tensor([0, 1, 10**12])}, "at most 1000000"),
    "control": ({"\x1b[31m": torch.zeros(1), "targets": None}, r"holds \\x1b\[31m, inputs"),
}


@pytest.mark.parametrize(("changed", "text"), BAD_EXAMPLES.values(), ids=BAD_EXAMPLES)
def test_examples_that_no_model_can_take_are_refused(tmp_path, changed, text):
    path = tmp_path / "examples.safetensors"
    save_file({k: v for k, v in examples(**changed).items() if v is not None}, path)
    with pytest.raises(DataError, match=text):
        read_examples(path)


def test_what_is_no_file_of_examples_is_said(tmp_path):
    for path, text in (
        (tmp_path, "is a folder; give a file"),
        (tmp_path / "none.safetensors", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/dev/zero"), "is a device or a pipe"),
    ):
        with pytest.raises(DataError, match=text):
            read_examples(path)


def test_examples_in_double_precision_become_single(tmp_path):
    path = tmp_path / "examples.safetensors"
    save_file(examples(inputs=torch.ones(3, 1, 4, 4).double(), targets=torch.zeros(3).byte()), path)
    found = read_examples(path)
    assert (found.inputs.dtype, found.targets.dtype) == (torch.float32, torch.int64)


def test_the_fingerprint_follows_the_files_and_not_the_limit():
    whole = load("digits").fingerprint
    assert load("digits", 100).fingerprint == whole
    assert len(whole) == 12
    source = READERS["digits"]()
    for other in (
        replace(source.pictures, targets=source.pictures.targets.flip(0)),
        source.pictures.keep(torch.arange(len(source.pictures) - 1)),
        replace(source.pictures, values=source.pictures.values.roll(1)),
    ):
        assert fingerprint_of([other]) != whole
    assert fingerprint_of([source.pictures]) == whole


def test_a_cut_gzip_stream_is_an_error_too(tmp_path):
    write_idx(tmp_path / "whole.gz", np.zeros(500, np.uint8))
    (tmp_path / "x.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-12])
    with pytest.raises(DataError, match=r"x.gz cannot be read"):
        read_idx(tmp_path / "x.gz")


def test_fashion_mnist_is_read_from_the_system_where_it_is_installed(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for part, num in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 255, (num, 28, 28), np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(num, dtype=np.uint8) % 10)
    monkeypatch.setattr(sources, "FASHION_MNIST_FOLDER", tmp_path)
    dataset = load("fashion-mnist")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (54, 6, 20)
    assert dataset.input_shape == (1, 28, 28)


def stub_torchvision(monkeypatch, make):
    names = ("FashionMNIST", "CIFAR10", "CIFAR100", "SVHN")
    monkeypatch.setitem(
        sys.modules, "torchvision.datasets", SimpleNamespace(**dict.fromkeys(names, make))
    )


def test_data_that_cannot_be_had_says_where_it_was_looked_for(tmp_path, monkeypatch):
    def offline(folder, download, train):
        raise OSError("no route to host")

    stub_torchvision(monkeypatch, offline)
    monkeypatch.setattr(sources, "FASHION_MNIST_FOLDER", tmp_path / "absent")
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError, match=r"FashionMNIST is not in .*mine and cannot be downloaded "):
        load("fashion-mnist")
    with pytest.raises(DataError, match=r"no route to host\); connect.*or set NORMKIT_DATA"):
        load("cifar10")


def test_colour_pictures_come_out_channels_first(monkeypatch):
    def cifar(folder, download, train):
        data = np.zeros((30, 32, 16, 3), np.uint8)
        data[..., 2] = 200  # blue
        data[:10, :, :, 2] = 100
        return SimpleNamespace(data=data, targets=list(range(10)) * 3)

    stub_torchvision(monkeypatch, cifar)
    dataset = load("cifar10")
    assert dataset.input_shape == (3, 32, 16)
    assert dataset.train.inputs[:, :2].abs().max() == 0
    assert dataset.train.inputs[:, 2].std() > 0.5


def test_house_numbers_are_channels_first_already(monkeypatch):
    def svhn(folder, download, split):
        assert split in ("train", "test")
        return SimpleNamespace(data=np.ones((20, 3, 32, 16), np.uint8), labels=np.arange(20) % 10)

    stub_torchvision(monkeypatch, svhn)
    assert load("svhn").input_shape == (3, 32, 16)


@pytest.mark.parametrize("name", ["digits", "imagenet", "scenes", "voc", "clips", COCO, SOMETHING])
def test_the_name_of_a_data_set_is_not_hidden_by_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert data_text(name) == name
    assert data_text(f"{name}:side=96") == f"{name}:side=96"
    assert data_text(f"./{name}") == f"folder:{tmp_path / name}"


def test_a_path_is_a_folder_from_wherever_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    for path in ("photos", "./photos", "folder:photos", f"../{tmp_path.name}/photos", "~/photos"):
        assert data_text(path) == f"folder:{tmp_path / 'photos'}"
    assert data_text("./absent") == f"folder:{tmp_path / 'absent'}"
    assert data_text("absent") == "absent"
    assert data_text("my.py:make") == f"{tmp_path / 'my.py'}:make"
