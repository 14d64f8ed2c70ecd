import numpy as np
import pytest
import torch
from PIL import Image

from normkit.errors import DataError
from normkit.lab.data.dataset import Pictures
from normkit.lab.data.folder import read_folder
from normkit.lab.data.given import read_given
from normkit.lab.data.streamed import Streamed
from normkit.lab.data.views import Augmentation, at_size
from normkit.lab.loading import Loading, loaded_batches
from pictures import fill


@pytest.fixture
def photos(tmp_path):
    fill(tmp_path / "photos", per_class=20)
    return tmp_path / "photos"


def test_class_folders_are_split_in_proportion_and_scaled_by_the_training_pictures(photos):
    data = read_folder(photos)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [29, 3, 8]
    assert data.test.targets.bincount().tolist() == [4, 4]
    assert isinstance(data.train, Pictures)
    assert data.train.values.dtype == torch.uint8  # a byte a value
    inputs = data.train.take(torch.arange(29)).inputs.double()
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-6
    assert (inputs.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    again = read_folder(photos)
    assert torch.equal(again.train.values, data.train.values)
    assert again.fingerprint == data.fingerprint


def test_the_values_are_those_of_the_file(photos):
    data = read_folder(photos)
    expected = {
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in photos.rglob("*.png")
    }
    parts = (data.train, data.validation, data.test)
    found = {bytes(value.numpy().tobytes()) for part in parts for value in part.values}
    assert found == expected


def test_own_parts_are_taken_as_they_are(tmp_path):
    for part, number in (("train", 6), ("val", 3), ("test", 2)):
        fill(tmp_path / part, per_class=number)
    data = read_folder(tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 6, 4]


def test_classes_that_differ_between_parts_are_named(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", classes=("cat", "bird"))
    with pytest.raises(DataError, match=r"differ: bird, dog are in only one of them"):
        read_folder(tmp_path)


def test_a_picture_that_does_not_decode_is_named_and_counted_and_the_rest_is_used(photos):
    (photos / "cat" / "3.png").write_bytes(b"no picture")
    cut = (photos / "dog" / "4.png").read_bytes()[:60]
    (photos / "dog" / "4.png").write_bytes(cut)
    data = read_folder(photos)
    assert sum(map(len, (data.train, data.validation, data.test))) == 38
    (note,) = data.notes
    assert note == "2 pictures cannot be read and are left out: cat/3.png, dog/4.png"


def test_the_fingerprint_changes_with_a_picture_and_with_a_folder(photos):
    first = read_folder(photos).fingerprint
    Image.new("RGB", (8, 8)).save(photos / "cat" / "0.png")
    second = read_folder(photos).fingerprint
    fill(photos, classes=("emu",))
    assert len({first, second, read_folder(photos).fingerprint}) == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, r"is not a folder; give one with a folder per class"),
        (lambda root: root.mkdir(), r"has no folder; it needs a folder of pictures for each class"),
        (lambda root: fill(root, classes=("cat",)), r"has cat; it needs a folder of pictures"),
        (lambda root: fill(root, per_class=0), r"has no pictures in its class folders"),
        (lambda root: fill(root / "test"), r"has test and no folder train"),
    ],
)
def test_folders_without_pictures_say_what_is_missing(tmp_path, make, said):
    make(tmp_path / "photos")
    with pytest.raises(DataError, match=said):
        read_folder(tmp_path / "photos")


def test_pictures_of_different_sizes_are_read_when_needed_and_scaled(tmp_path):
    fill(tmp_path, size=(40, 30))
    fill(tmp_path / "", size=(50, 20), classes=("emu",))
    data = read_folder(tmp_path, side=16)
    assert isinstance(data.train, Streamed)
    assert data.input_shape == (3, 16, 16)
    assert data.train.take(torch.tensor([0, 5])).inputs.shape == (2, 3, 16, 16)
    assert read_folder(tmp_path).input_shape == (3, 224, 224)


def test_grey_pictures_become_coloured_beside_coloured_ones(tmp_path):
    fill(tmp_path, mode="L", classes=("cat", "dog"))
    assert read_folder(tmp_path).input_shape == (1, 8, 8)
    fill(tmp_path, mode="RGB", classes=("emu",))
    assert read_folder(tmp_path).input_shape == (3, 8, 8)


def test_a_centre_is_what_evaluation_sees():
    """A constant frame around a constant centre, in pictures twice as large as the centre crop."""
    picture = torch.zeros(1, 64, 64, dtype=torch.uint8)
    picture[:, 4:60, 4:60] = 200
    seen = at_size(picture, (28, 28))  # 64 to 32, of which the middle 28 are seen
    assert seen.shape == (1, 28, 28)
    assert seen[:, 1:-1, 1:-1].eq(200).all()
    assert at_size(picture, (64, 64)) is picture


def test_augmentations_move_mirror_and_cut():
    picture = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8)
    torch.manual_seed(0)
    cropped = [Augmentation(("crop",), (8, 8))(picture) for _ in range(50)]
    padded = torch.nn.functional.pad(picture, (1, 1, 1, 1))
    windows = {
        padded[:, y : y + 8, x : x + 8].numpy().tobytes() for y in (0, 1, 2) for x in (0, 1, 2)
    }
    assert {view.numpy().tobytes() for view in cropped} == windows
    flipped = [Augmentation(("flip",), (8, 8))(picture) for _ in range(20)]
    assert {v.numpy().tobytes() for v in flipped} == {
        picture.numpy().tobytes(), picture.flip(2).numpy().tobytes()
    }  # fmt: skip
    cuts = [Augmentation(("cutout",), (8, 8))(picture) for _ in range(50)]
    assert {int((view == 0).sum()) for view in cuts} <= {4, 6, 8, 9, 12, 16}
    assert max(int((view == 0).sum()) for view in cuts) == 16  # a square of half the side
    parts = Augmentation(("imagenet",), (6, 6))(picture)
    assert parts.shape == (1, 6, 6)


@pytest.mark.parametrize("augment", [(), ("crop", "flip")])
def test_batches_are_the_same_however_many_processes_read_them(photos, augment):
    data = read_folder(photos)
    parts = [torch.tensor([3, 1, 4]), torch.tensor([1, 5])]
    before = torch.get_rng_state()
    found = [
        list(loaded_batches(data.train, parts, Loading(augment, seed=7, num_workers=workers)))
        for workers in (0, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    for here, there in zip(*found, strict=True):
        assert torch.equal(here.inputs, there.inputs)
        assert torch.equal(here.targets, there.targets)
    assert torch.equal(found[0][1].targets, data.train.targets[parts[1]])
    other = list(loaded_batches(data.train, parts, Loading(augment, seed=8)))
    assert torch.equal(other[0].inputs, found[0][0].inputs) == (not augment)


def tensors(num, channels=3, floating=False):
    values = torch.randint(256, (num, channels, 8, 8), dtype=torch.uint8)
    targets = torch.arange(num) % 3
    return torch.utils.data.TensorDataset(values.float() / 255 if floating else values, targets)


class Listed(torch.utils.data.Dataset):
    """PIL pictures and classes, without an attribute for the classes."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, at):
        return Image.new("RGB", (8, 8), (at, 0, 0)), at % 3


@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        (lambda: tensors(60), [43, 5, 12]),
        (lambda: (tensors(30), tensors(9)), [27, 3, 9]),
        (lambda: (tensors(30), tensors(6), tensors(9)), [30, 6, 9]),
        (lambda: {"train": tensors(30), "val": tensors(6)}, [24, 6, 6]),
        (lambda: {"train": Listed(30), "test": Listed(9)}, [27, 3, 9]),
    ],
)
def test_data_sets_are_taken_as_a_user_has_them(given, lengths):
    data = read_given(given(), "mine")
    assert [len(part) for part in (data.train, data.validation, data.test)] == lengths
    assert (data.num_classes, data.input_shape) == (3, (3, 8, 8))
    assert data.train.take(torch.tensor([0])).inputs.dtype == torch.float32


def test_floating_pictures_are_what_the_network_gets():
    source = tensors(20, floating=True)
    data = read_given({"train": source, "validation": source, "test": source}, "mine")
    assert torch.equal(data.train.take(torch.tensor([3])).inputs[0], source[3][0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: 3, r"given as int; give a dict"),
        (lambda: {"training": tensors(3)}, r"data sets were given as"),
        (lambda: (tensors(0), tensors(3)), r"mine \(train\) has no examples"),
        (lambda: [1, 2, 3], r"mine \(train\) gave a int at position 0"),
        (lambda: [(torch.zeros(3), 1)], r"example 0 of mine .* a tensor of shape \(3,\) as its"),
        (lambda: [(torch.zeros(1, 2, 2), "cat")], r"classes that are not whole numbers"),
        (
            lambda: ([(torch.zeros(1, 2, 2), 0)], [(torch.zeros(1, 2, 2), 5)]),
            r"has the classes \[5\]",
        ),
    ],
)
def test_what_is_no_data_set_is_refused(given, said):
    with pytest.raises(DataError, match=said):
        read_given(given(), "mine")
