"""Data sets and networks that the papers name."""

import numpy as np
import pytest
import torch
from PIL import Image

from normkit.errors import DataError, SpecError
from normkit.lab import compare
from normkit.lab.data import open_data, sources
from normkit.lab.data.opening import forget_data
from normkit.lab.models import build_model


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    forget_data()
    yield tmp_path
    forget_data()


def picture(path, value, side=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path)


def values_of(split):
    """The grey value of each picture, as it was written."""
    return sorted(int(split.picture(at).flatten()[0]) for at in range(len(split)))


def test_imagenet_is_tested_on_its_validation_folder(data_folder):
    for label, name in enumerate(("ant", "bee")):
        for at in range(20):
            picture(data_folder / "imagenet" / "train" / name / f"{at}.png", 100 * label + at)
        for at in range(3):
            picture(data_folder / "imagenet" / "val" / name / f"{at}.png", 200 + 10 * label + at)
    found = open_data("imagenet", side=4)
    assert (len(found.train), len(found.validation), len(found.test)) == (36, 4, 6)
    assert values_of(found.test) == [200, 201, 202, 210, 211, 212]
    trained_on = open_data("imagenet", side=4, hold_out=False)
    assert values_of(trained_on.train) == [*range(20), *range(100, 120)]
    assert open_data("imagenet").input_shape == (3, 224, 224)
    (data_folder / "imagenet" / "val").rename(data_folder / "imagenet" / "other")
    forget_data()
    with pytest.raises(DataError, match="imagenet has no folder val; put one there"):
        open_data("imagenet")


def test_caltech_is_split_by_class_and_the_same_each_time(data_folder):
    folder = data_folder / "256_ObjectCategories"
    for label, (name, number) in enumerate((("ape", 85), ("bat", 90))):
        for at in range(number):
            picture(folder / name / f"{at:03}.png", 100 * label + at)
    picture(folder / "257.clutter" / "000.png", 255)
    found = open_data("caltech256", side=4)
    assert found.num_classes == 2
    parts = (found.train, found.validation, found.test)
    assert [len(part) for part in parts] == [80, 20, 60]
    for part in parts:
        assert torch.bincount(part.targets).tolist() == [len(part) // 2] * 2
    everything = [value for part in parts for value in values_of(part)]
    assert len(set(everything)) == 160
    forget_data()
    assert values_of(open_data("caltech256", side=4).train) == values_of(found.train)
    drawn = values_of(found.train)
    forget_data()
    other = open_data("caltech256:seed=1", side=4)
    assert [len(part) for part in (other.train, other.validation, other.test)] == [80, 20, 60]
    assert values_of(other.train) != drawn
    assert other.fingerprint != found.fingerprint
    forget_data()
    assert open_data("caltech256:seed=0", side=4).fingerprint == found.fingerprint
    for at in range(20):
        (folder / "ape" / f"{at:03}.png").unlink()
    forget_data()
    with pytest.raises(DataError, match="ape has 65 pictures; the split takes 80 of each class"):
        open_data("caltech256")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caltech256:seed=x", "caltech256 was given 'seed=x'; it takes seed=N with a whole number"),
        ("caltech256:seed=1234567890", "whole number of at most 9 digits"),
        ("caltech256:size=3", "caltech256 was given 'size=3'; it takes seed=N"),
        ("imagenet:seed=1", "imagenet was given 'seed=1'; it takes no argument"),
        ("image-net", "known are .*cifar100-40k, .*imagenet, caltech256, .*folder:PATH"),
    ],
)
def test_names_and_arguments_that_there_are_not_are_refused(text, message):
    with pytest.raises(SpecError, match=message):
        open_data(text)


@pytest.mark.parametrize("name", ["imagenet", "caltech256"])
def test_a_folder_that_is_missing_is_named(data_folder, name):
    with pytest.raises(DataError, match=r"does not exist; put .* into it, or set NORMKIT_DATA"):
        open_data(name)


def test_extra_pictures_of_svhn_train_and_are_not_tested(monkeypatch):
    sizes = {"train": 20, "test": 5, "extra": 30}

    class SVHN:
        def __init__(self, folder, split, download):
            size = sizes[split]
            value = list(sizes).index(split)
            self.data = np.full((size, 3, 4, 4), value, np.uint8)
            self.labels = np.arange(size) % 5

    monkeypatch.setattr(
        sources.importlib, "import_module", lambda name: type("D", (), {"SVHN": SVHN})
    )
    monkeypatch.setattr(sources, "register_missing_operators", lambda: None)
    forget_data()
    found = open_data("svhn-extra")
    forget_data()
    assert (len(found.train), len(found.validation), len(found.test)) == (40, 10, 5)
    written = torch.cat([found.train.values, found.validation.values])[:, 0, 0, 0]
    assert torch.bincount(written.int()).tolist() == [20, 0, 30]
    assert set(found.test.values.unique().tolist()) == {1}


def test_a_fifth_of_cifar100_is_held_out_for_the_paper_that_tunes(monkeypatch):
    class CIFAR100:
        def __init__(self, folder, train, download):
            size = 100 if train else 20
            self.data = np.arange(size, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
            self.targets = [at % 10 for at in range(size)]

    monkeypatch.setattr(
        sources.importlib, "import_module", lambda name: type("D", (), {"CIFAR100": CIFAR100})
    )
    monkeypatch.setattr(sources, "register_missing_operators", lambda: None)
    forget_data()
    found = open_data("cifar100-40k")
    forget_data()
    assert (len(found.train), len(found.validation), len(found.test)) == (80, 20, 20)
    assert torch.bincount(found.validation.targets).tolist() == [2] * 10
    both = torch.cat([found.train.values, found.validation.values])
    assert sorted(both[:, 0, 0, 0].tolist()) == list(range(100))


def test_without_hold_out_everything_is_trained_on():
    kept, all_of_it = open_data("digits"), open_data("digits", hold_out=False)
    assert len(all_of_it.train) == len(kept.train) + len(kept.validation)
    index = torch.arange(len(all_of_it.train))
    both = torch.cat([kept.train.take(torch.arange(len(kept.train))).inputs,
                      kept.validation.take(torch.arange(len(kept.validation))).inputs])  # fmt: skip
    assert torch.equal(all_of_it.train.take(index).inputs, both)
    with pytest.raises(SpecError, match="without --hold-out these are trained on; leave one"):
        compare(norms=["bn"], tune_lr=[0.1, 0.2], hold_out=False, out="unused")


def num_parameters(name, num_classes=10):
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, input_shape=(3, 32, 32)).model
    return sum(p.numel() for p in model.parameters()), model


@pytest.mark.parametrize(
    ("name", "millions", "num_convolutions"),
    [  # as He et al. print them: 0.27, 1.7; and torchvision's less its stem, plus 3x3 of 64
        # Zagoruyko and Komodakis count 36.5 million, and three shortcuts among the convolutions
        ("thin-resnet:depth=20", 0.27, 19),
        ("thin-resnet:depth=110", 1.73, 109),
        ("cifar-resnet:depth=18", 11.17, 20),
        ("cifar-resnet:depth=50", 23.52, 53),
        ("cifar-densenet:depth=121", 6.96, 120),
        ("cifar-densenet:depth=21", 0.027, 20),
        ("wide-resnet:depth=28:width=10", 36.48, 28),
        ("wide-resnet:depth=40:width=4", 8.95, 40),
        ("wide-resnet:depth=10:width=2", 0.304, 10),
        ("resnet12", 8.00, 16),  # about 8 million where the channels are 64, 128, 256 and 512
    ],
)
def test_networks_for_32_pixels_have_their_depth_and_size(name, millions, num_convolutions):
    number, model = num_parameters(name)
    assert number / 1e6 == pytest.approx(millions, abs=0.005)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == num_convolutions
    assert convolutions[0].stride == (1, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thin-resnet:depth=21", "thin-resnet was given depth=21; give 6n \\+ 2"),
        ("wide-resnet:depth=12", "wide-resnet was given depth=12; give 6n \\+ 4, such as 10"),
        ("cifar-resnet:depth=20", "cifar-resnet was given depth=20; give one of 18, 34, 50"),
        ("cifar-densenet:depth=20", "cifar-densenet was given depth=20; give one of 21, 121, 161"),
    ],
)
def test_depths_that_there_are_not_are_refused(name, message):
    with pytest.raises(SpecError, match=message):
        build_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("name", "first_block"),
    [("cifar-resnet:depth=18", "layer1"), ("cifar-densenet:depth=121", "features.norm0")],
)
def test_a_stem_for_32_pixels_keeps_the_map(name, first_block):
    model = build_model(name, num_classes=10, input_shape=(3, 32, 32)).model
    shapes = []
    model.get_submodule(first_block).register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape)
    )
    model.eval()(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 64, 32, 32)]


def test_a_wide_network_normalises_before_it_convolves():
    model = build_model("wide-resnet:width=2", num_classes=10).model
    norms = [m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == [16, 32, 32, 64, 64, 128, 128]
    stages = [m.conv1.stride[0] for m in model.modules() if hasattr(m, "conv1")]
    assert stages == [1, 2, 2]
    block = model[1].eval()
    x = torch.randn(2, 16, 8, 8)
    activated = torch.relu(block.norm1(x))  # its input is normalised before the shortcut, too
    y = block.conv2(torch.relu(block.norm2(block.conv1(activated))))
    assert torch.equal(block(x), y + block.shortcut(activated))


@pytest.mark.parametrize("size", [84, 28, 8])
def test_twelve_convolutions_halve_the_map_as_long_as_there_is_one(size):
    model = build_model("resnet12:width=4", num_classes=3, input_shape=(1, size, size)).model
    maps = []
    for module in model:
        if hasattr(module, "conv3"):
            module.register_forward_hook(lambda m, i, o: maps.append(o.shape[1:]))
    assert model(torch.randn(2, 1, size, size)).shape == (2, 3)
    assert [tuple(m) for m in maps] == [
        (4 * 2**at, max(1, size >> at), max(1, size >> at)) for at in range(4)
    ]
