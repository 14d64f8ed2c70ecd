"""Data sets with the papers' splits, on small stand-ins of their files."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from normkit.errors import DataError, SpecError
from normkit.lab.data import FOLDERS, open_data
from normkit.lab.data.dataset import Pictures
from normkit.lab.data.opening import forget_data
from normkit.lab.data.published import CALTECH_SPLIT, split_by_class
from normkit.lab.data.streamed import Streamed


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    forget_data()
    yield tmp_path
    forget_data()


def write(folder, number, shade, size=(8, 6)):
    """Pictures whose first value is their number and whose last one is the class."""
    folder.mkdir(parents=True)
    for at in range(number):
        values = np.full((size[1], size[0], 3), shade, np.uint8)
        values[0, 0, 0] = at
        Image.fromarray(values).save(folder / f"{at:03}.png")


def numbers(split):
    """Class and number of every picture of a split."""
    found = []
    for at in range(len(split)):
        picture = split.picture(at)
        found.append((int(split.targets[at]), int(picture[0, 0, 0])))
    return found


def test_imagenet_trains_on_all_and_tests_on_val(home):
    for name, shade in (("n01", 10), ("n02", 20)):
        write(home / "imagenet" / "train" / name, 5, shade)
        write(home / "imagenet" / "val" / name, 2, shade)
    dataset = open_data("imagenet", None, 4)
    assert dataset.input_shape == (3, 4, 4)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (10, 4, 4)
    assert numbers(dataset.test) == numbers(dataset.validation)
    assert isinstance(dataset.train, Streamed)
    forget_data()
    assert open_data("imagenet").input_shape == (3, 224, 224)
    assert len(open_data("imagenet", limit=4).train) == 4


def test_caltech_has_40_10_and_30_pictures_of_each_category_by_seed(home):
    root = home / "caltech256" / "256_ObjectCategories"
    for name, shade, number in (("001.ak47", 1, 81), ("002.flag", 2, 95), ("257.clutter", 3, 4)):
        write(root / name, number, shade)
    found = {}
    for seed in (0, 1):
        dataset = open_data(f"caltech256:seed={seed}", None, 8)
        parts = {part: numbers(getattr(dataset, part)) for part in CALTECH_SPLIT}
        for part, count in CALTECH_SPLIT.items():
            assert [label for label, _ in parts[part]].count(0) == count
            assert [label for label, _ in parts[part]].count(1) == count
        every = [each for part in parts.values() for each in part]
        assert len(set(every)) == len(every) == 160
        found[seed] = parts, dataset.fingerprint
    assert found[0] != found[1]
    forget_data()
    plain = open_data("caltech256", None, 8)
    assert {part: numbers(getattr(plain, part)) for part in CALTECH_SPLIT} == found[0][0]
    assert plain.num_classes == 2


def test_a_class_with_too_few_pictures_is_named(tmp_path):
    targets = torch.tensor([0] * 80 + [1] * 79)
    with pytest.raises(DataError, match=r"class 1 of .* has 79 pictures .* takes 40 \+ 10 \+ 30"):
        split_by_class(targets, [40, 10, 30], 0, tmp_path)


def test_missing_data_are_answered_by_where_to_put_them(home):
    with pytest.raises(DataError, match=r"ImageNet is not in .*imagenet; download .* NORMKIT_DATA"):
        open_data("imagenet")
    with pytest.raises(DataError, match=r"Caltech-256 is not in .*256_ObjectCategories; download"):
        open_data("caltech256")
    (home / "imagenet" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="its folders train and val there"):
        open_data("imagenet")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("caltech256:seed=x", r"caltech256 takes seed=N, a whole number"),
        ("caltech256:size=3", r"the argument 'size=3'; caltech256 takes seed=N"),
        ("imagenet:seed=1", r"imagenet takes no argument"),
        ("image-net", r"known are .*cifar100-40k, svhn-extra, imagenet, caltech256"),
    ],
)
def test_names_and_arguments_that_there_are_not_are_refused(home, text, said):
    with pytest.raises(SpecError, match=said):
        open_data(text)


def stub(monkeypatch, **makers):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(**makers))


def test_svhn_with_extra_is_split_80_to_20(home, monkeypatch):
    sizes = {"train": 30, "extra": 70, "test": 10}

    def svhn(folder, download, split):
        assert folder == home
        shades = {"train": 1, "extra": 2, "test": 3}
        data = np.full((sizes[split], 3, 4, 4), shades[split], np.uint8)
        return SimpleNamespace(data=data, labels=np.arange(sizes[split]) % 10)

    stub(monkeypatch, SVHN=svhn)
    dataset = open_data("svhn-extra")
    assert isinstance(dataset.train, Pictures)
    assert dataset.train.values.dtype == torch.uint8
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (80, 20, 10)
    every = torch.cat([dataset.train.values, dataset.validation.values])[:, 0, 0, 0]
    assert torch.bincount(every).tolist() == [0, 30, 70]
    assert set(dataset.test.values.flatten().tolist()) == {3}
    assert torch.bincount(dataset.validation.targets).tolist() == [2] * 10


def test_cifar_100_keeps_a_fifth_for_validation_and_mnist_is_mnist(home, monkeypatch):
    def cifar(folder, download, train):
        data = np.zeros((100 if train else 20, 4, 4, 3), np.uint8)
        return SimpleNamespace(data=data, targets=[at % 10 for at in range(len(data))])

    def mnist(folder, download, train):
        data = torch.zeros(40 if train else 10, 5, 5, dtype=torch.uint8)
        return SimpleNamespace(data=data, targets=torch.arange(len(data)) % 10)

    stub(monkeypatch, CIFAR100=cifar, MNIST=mnist)
    dataset = open_data("cifar100-40k")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (80, 20, 20)
    digits = open_data("mnist")
    assert digits.input_shape == (1, 5, 5)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (36, 4, 10)


def test_they_are_listed():
    assert list(FOLDERS) == ["imagenet", "caltech256"]
