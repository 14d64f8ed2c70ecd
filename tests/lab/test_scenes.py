import pytest
import torch

from normkit.errors import SpecError
from normkit.lab.data.annotated import Drawn, Part, Parts, held_out
from normkit.lab.data.clips import DOES, ClipOptions, _path, clips, draw_clip
from normkit.lab.data.dataset import Pictures
from normkit.lab.data.scenes import (
    SceneOptions,
    _leaves_visible,
    boxes_of,
    draw_scene,
    generator_of,
    scenes,
    single_items,
)

SCENES = "scenes:items=digits:side=48:most=4"


@pytest.fixture(scope="module")
def drawn():
    found = scenes(SCENES)
    return found, [found.train[at] for at in range(40)]


def test_a_scene_is_the_same_each_time_and_others_differ(drawn):
    found, examples = drawn
    again = scenes(SCENES)
    for at in (0, 7):
        assert torch.equal(again.train[at].picture, examples[at].picture)
        assert torch.equal(again.train[at].masks, examples[at].masks)
    assert not torch.equal(examples[0].picture, examples[1].picture)
    assert not torch.equal(found.test[0].picture, examples[0].picture)
    assert found.fingerprint == again.fingerprint != ""


def test_boxes_are_those_of_the_visible_pixels(drawn):
    for example in drawn[1]:
        for box, mask in zip(example.boxes.tolist(), example.masks, strict=True):
            pixels = mask.nonzero()
            top, left = pixels.min(0).values.tolist()
            bottom, right = (pixels.max(0).values + 1).tolist()
            assert box == [left, top, right, bottom]


def test_no_pixel_belongs_to_two_objects_and_none_is_mostly_hidden(drawn):
    examples = drawn[1]
    assert all(int(example.masks.sum(0).max()) == 1 for example in examples)
    assert {len(example.labels) for example in examples} == {1, 2, 3, 4}
    assert all(1 <= int(label) <= 10 for example in examples for label in example.labels)


def test_an_object_that_would_hide_much_of_another_is_left_out():
    behind = torch.zeros(10, 10, dtype=torch.bool)
    behind[:, :5] = True  # 50 pixels
    front = torch.zeros(10, 10, dtype=torch.bool)
    front[:4, :5] = True  # hides 20 of them
    assert _leaves_visible(front, [behind], [50])
    front[4, 0] = True
    assert not _leaves_visible(front, [behind], [50])
    seen = behind.clone()
    seen[9] = False  # five were hidden before
    assert not _leaves_visible(front ^ (front & ~behind), [seen], [50])


def test_a_scene_of_one_place_has_one_object():
    full = Pictures(
        values=torch.full((1, 1, 4, 4), 16, dtype=torch.uint8), targets=torch.zeros(1, dtype=int)
    )
    for at in range(20):  # objects of four pixels on seven by seven overlap mostly
        scene = draw_scene(SceneOptions(side=5, most=9), full, 0, at)
        assert 1 <= len(scene.labels) <= 2
        assert int(scene.picture[0][scene.masks[-1]].min()) == 255


def test_class_maps_follow_the_masks(drawn):
    example = next(e for e in drawn[1] if len(e.labels) > 1)
    found = example.class_map()
    for label, mask in zip(example.labels, example.masks, strict=True):
        assert bool((found[mask] == label).all())
    assert bool((found[~example.masks.any(0)] == 0).all())


def test_single_objects_fill_small_pictures():
    pictures, classes = single_items(SCENES, 30)
    assert pictures.shape == (30, 1, 24, 24)
    assert float(pictures.min()) == 0
    assert float(pictures.max()) == 1
    assert set(classes.tolist()) <= set(range(10))
    assert torch.equal(pictures, single_items(SCENES, 30)[0])


def test_boxes_of_no_masks_have_four_columns():
    assert boxes_of(torch.zeros(0, 5, 5, dtype=torch.bool)).shape == (0, 4)


@pytest.mark.parametrize("text", ["scenes:size=3", "scenes:side=0", "scenes:side=9:side=9"])
def test_unknown_options_of_scenes_are_refused(text):
    with pytest.raises(
        SpecError, match=r"it takes side=N, most=N, smallest=N, .*items=NAME, each once"
    ):
        scenes(text)


def test_clips_of_opposite_classes_show_the_same_frames_in_opposite_order():
    for first in range(0, len(DOES), 2):
        paths = []
        for label in (first, first + 1):
            what, direction = list(DOES.values())[label]
            course = torch.linspace(-1, 1, 8) * direction
            paths.append(_path(what, course, generator_of(0, 0)))
        for name in paths[0]:
            assert torch.allclose(paths[0][name], paths[1][name].flip(0))


def test_clips_move_as_their_class_says():
    square = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    square[..., 7:21, 7:21] = 255
    items = Pictures(values=square, targets=torch.zeros(1, dtype=int))
    grid = torch.arange(40.0)
    for label, name in enumerate(DOES):
        frames = draw_clip(ClipOptions(), items, 0, label).frames[:, 0].float()
        frames = torch.where(frames > 60, frames, 0.0)
        light = frames.sum((1, 2))
        x, y = ((frames.sum(axis) * grid).sum(1) / light for axis in (1, 2))
        change = {"x": x[-1] - x[0], "y": y[-1] - y[0], "light": light[-1] - light[0]}
        if name.startswith("moves"):
            axis, sign = DOES[name]
            assert change[axis] * sign > 5, name
        elif not name.startswith("turns"):
            assert change["light"] * DOES[name][1] > 0, name


def test_clips_are_the_same_each_time_and_have_every_class():
    found, again = clips("clips:items=digits"), clips("clips:items=digits")
    assert [found.train[at].label for at in range(12)] == [*range(10), 0, 1]
    assert torch.equal(found.train[3].frames, again.train[3].frames)
    assert found.train[0].frames.shape == (8, 1, 40, 40)
    assert found.class_names[0] == "moves left"


def test_parts_are_held_out_disjoint_and_limited():
    source = Drawn(lambda at: at, 20)
    train, validation = held_out(source, 0.1)
    assert sorted([*train.positions.tolist(), *validation.positions.tolist()]) == list(range(20))
    assert len(validation) == 2
    parts = Parts(
        name="numbers",
        num_classes=2,
        input_shape=(1, 1, 1),
        train=train,
        validation=validation,
        test=Part.of(source),
    )
    assert parts.num_examples == 18
    few = parts.limited(9)
    assert (len(few.train), len(few.validation), len(few.test)) == (9, 1, 20)
    assert parts.limited(None) is parts
    assert sorted(parts.with_validation_in_training().train.take(torch.arange(20))) == list(
        range(20)
    )


@pytest.mark.parametrize("text", ["scenes:largest=120", "scenes:smallest=60:largest=70"])
def test_large_objects_fit_into_their_scene(text):
    found = scenes(f"{text}:side=32:test=4")
    assert found.test.take(torch.arange(4))[0].picture.shape == (1, 32, 32)
    pictures, _ = single_items(f"{text}:side=32:test=4", 2)
    assert pictures.shape[-1] == 16
