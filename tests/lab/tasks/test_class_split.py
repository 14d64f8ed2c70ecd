"""Classes are divided without overlap, and nothing is known of novel ones before the test."""

import numpy as np
import pytest
import torch
from PIL import Image

from normkit.errors import DataError, SpecError
from normkit.lab.data import open_data
from normkit.lab.data.dataset import Dataset, Pictures, Scaling
from normkit.lab.tasks.class_split import (
    ClassSplit,
    Pool,
    chosen_classes,
    divided,
    read_class_folders,
    split_of_folders,
)


def dataset(sizes=(40, 10, 20), num_classes=6):
    """Pictures that name their class, 10 times it, and their part; classes in turn."""
    parts = {}
    for part, size in zip(("train", "validation", "test"), sizes, strict=True):
        targets = torch.arange(size * num_classes) % num_classes
        values = (10 * targets)[:, None, None, None].expand(-1, 1, 4, 4).clone()
        values[:, :, 0, 0] = torch.arange(len(targets))[:, None] % 256
        parts[part] = Pictures(values=values.byte(), targets=targets)
    scaling = parts["train"].own_scaling()
    return Dataset(
        name="made",
        num_classes=num_classes,
        fingerprint="0" * 12,
        **{part: split.scaled(scaling) for part, split in parts.items()},
    )


def labels(split):
    """The classes that the pictures name."""
    return (split.values[:, 0, 1, 1] // 10).tolist()


CLASSES = ClassSplit(base=(0, 3, 4), validation=(5,), novel=(1, 2))


def split(classes=CLASSES, data=None, **changes):
    options = {"per_class": 15, "num_needed": 6}
    return divided(data or dataset(), classes, **(options | changes))


def test_classes_are_drawn_once_each_and_by_the_seed():
    found = [chosen_classes(dataset(), 2, 1, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    for one in found:
        assert sorted([*one.base, *one.validation, *one.novel]) == list(range(6))
        assert (len(one.novel), len(one.validation)) == (2, 1)


def test_too_few_classes_to_learn_are_refused():
    with pytest.raises(SpecError, match=r"novel=4:validation=1 leaves 1 of the 6 .*; leave 2 or"):
        chosen_classes(dataset(), 4, 1, 0)
    with pytest.raises(SpecError, match="leaves 0 of the 6 classes of made"):
        chosen_classes(dataset(), 40, 0, 0)


def test_only_base_classes_are_trained_on_and_they_are_counted_anew():
    found = split()
    assert found.num_classes == 3
    assert found.num_examples == 120
    for part in (found.train, found.validation, found.test):
        assert [CLASSES.base[at] for at in part.targets.tolist()] == labels(part)
    assert (len(found.train), len(found.validation), len(found.test)) == (120, 30, 60)


def test_pools_have_other_classes_the_test_pictures_first():
    found = split(per_class=25)
    for held, classes in (("test", CLASSES.novel), ("validation", CLASSES.validation)):
        pool = found.pools[held]
        named = [label for part in pool.parts for label in labels(part)]
        assert [classes[at] for at in pool.targets.tolist()] == named
        assert pool.targets.bincount().tolist() == [25] * len(classes)
        assert len(pool.parts[0]) == 20 * len(classes)  # all test pictures
        assert len(pool.parts[1]) == 5 * len(classes)
        assert found.fewest(held) == 25
    assert split(per_class=15).pools["test"].targets.bincount().tolist() == [15, 15]


def test_pictures_are_scaled_by_those_that_are_trained_on():
    found = split()
    expected = Scaling.of(found.train.values)
    inputs = found.train.take(torch.arange(len(found.train))).inputs
    assert inputs.mean().abs() < 1e-5
    assert inputs.std(correction=0) == pytest.approx(1, abs=1e-5)
    parts = [found.validation, found.test, *found.pools["test"].parts]
    for part in (*parts, *found.pools["validation"].parts):
        index = torch.arange(len(part))
        assert torch.equal(part.take(index).inputs, expected(part.values))


def test_a_limit_counts_base_pictures_in_equal_numbers():
    found = split(limit=30)
    assert found.train.targets.bincount().tolist() == [10, 10, 10]
    assert len(found.validation) == 30


def test_without_validation_classes_held_out_base_pictures_are_drawn():
    found = split(ClassSplit(base=(0, 3, 4, 5), validation=(), novel=(1, 2)))
    assert torch.equal(found.pools["validation"].targets, found.validation.targets)
    assert not any("trained on, too" in note for note in found.notes)


def test_where_they_are_too_few_trained_ones_are_drawn_and_that_is_said():
    few = dataset(sizes=(40, 3, 20))
    found = split(ClassSplit(base=(0, 3, 4, 5), validation=(), novel=(1, 2)), few)
    assert found.fewest("validation") == 15
    assert any("only 3 of a class are held out" in note for note in found.notes)


def test_a_pool_gives_pictures_in_the_order_that_is_asked_for():
    found = split(per_class=25).pools["test"]
    everything = torch.cat([p.take(torch.arange(len(p))).inputs for p in found.parts])
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))[:17]
    assert torch.equal(found.inputs(order), everything[order])
    assert torch.equal(Pool(found.parts[:1]).inputs(order[:0]), everything[:0])


def test_a_named_set_can_be_divided():
    whole = open_data("digits")
    found = divided(whole, chosen_classes(whole, 5, 0, 0), per_class=600, num_needed=6)
    assert found.num_classes == 5
    assert len(found.pools["test"].targets) == sum(
        int((part.targets == label).sum())
        for part in (whole.train, whole.validation, whole.test)
        for label in chosen_classes(whole, 5, 0, 0).novel
    )


def write(folder, parts, number=12):
    generator = np.random.default_rng(0)
    for part, classes in parts.items():
        for name in classes:
            place = folder / part / name
            place.mkdir(parents=True)
            for at in range(number):
                values = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(values).save(place / f"{at}.png")


def test_folders_whose_parts_have_classes_of_their_own_are_a_class_split(tmp_path):
    write(tmp_path, {"train": ["cat", "dog", "owl"], "val": ["bee"], "test": ["ant", "fox"]})
    data, classes = read_class_folders(tmp_path, None), split_of_folders(tmp_path)
    assert classes == ClassSplit(base=(0, 1, 2), validation=(3,), novel=(4, 5))
    found = divided(data, classes, per_class=600, num_needed=6)
    assert len(found.train) + len(found.validation) == 36
    assert len(found.validation) == 4  # a tenth
    assert found.test is found.validation
    assert found.pools["test"].targets.bincount().tolist() == [12, 12]
    assert found.pools["validation"].targets.bincount().tolist() == [12]


def test_folders_with_the_same_classes_or_without_parts_are_none(tmp_path):
    write(tmp_path / "same", {"train": ["a", "b"], "test": ["a", "b"]})
    write(tmp_path / "plain", {"": ["a", "b", "c"]})
    assert split_of_folders(tmp_path / "same") is None
    assert split_of_folders(tmp_path / "plain") is None
    assert split_of_folders(tmp_path / "nowhere") is None


def test_parts_that_share_some_classes_are_refused(tmp_path):
    write(tmp_path, {"train": ["a", "b"], "test": ["b", "c"]})
    with pytest.raises(DataError, match=r"b is in several of train, test, .* or each part cl"):
        split_of_folders(tmp_path)
