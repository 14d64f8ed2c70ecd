"""Detection as a task: data in COCO's form, average precision, and whole runs."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from detectors import BACKBONE, NARROW, SCENES
from normkit.errors import DataError, SpecError
from normkit.lab.data.annotated import Annotated, Drawn, Part
from normkit.lab.data.boxes import read_given_boxes
from normkit.lab.data.coco import mask_of, read_coco
from normkit.lab.dry_run import estimate
from normkit.lab.experiment import compare
from normkit.lab.records import TrainingRecord, read_records
from normkit.lab.spec import Protocol, SweepSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.detection import Images, average_precisions, mirrored

OPTIONS = ":".join(f"{name}={value}" for name, value in NARROW.items())
PROTOCOL = Protocol(
    data=SCENES, model=BACKBONE, limit=4, steps=2, lr_batch_size=None, base_lr=0.01, clip=5.0,
    task=f"instance-segmentation:head=4conv1fc:norms=heads:{OPTIONS}",
)  # fmt: skip


def annotations(**changes):
    """Two pictures of a cat and a dog, and one without boxes."""
    found = {
        "images": [
            {"id": at, "file_name": f"{at}.png", "height": 12, "width": 16} for at in (7, 8, 9)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [2, 3, 4, 5],
             "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]},
            {"id": 2, "image_id": 8, "category_id": 3, "bbox": [1, 1, 3, 3],
             "segmentation": {"size": [12, 16], "counts": [13, 3, 176]}},
            {"id": 3, "image_id": 8, "category_id": 3, "bbox": [5, 5, 6, 6], "iscrowd": 1,
             "segmentation": {"size": [12, 16], "counts": [60, 40, 92]}},
            {"id": 4, "image_id": 8, "category_id": 3, "bbox": [5, 5, 0, 6],
             "segmentation": [[5, 5, 5, 11, 5, 8]]},
        ],
    }  # fmt: skip
    return found | changes


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        write(tmp_path, annotations(), part)
        for at in (7, 8, 9):
            picture = np.full((12, 16, 3), at, dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / part / f"{at}.png")
    read_coco.cache_clear()
    return tmp_path


def write(folder, content, part="train2017"):
    path = folder / "annotations" / f"instances_{part}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_folder_like_cocos_is_read(coco):
    found = read_coco(coco, masks=True)
    assert (found.num_classes, found.class_names) == (2, ("cat", "dog"))
    assert (len(found.train), len(found.validation), len(found.test)) == (1, 1, 3)
    example = next(e for e in found.test.take(torch.arange(3)) if len(e.labels) == 1)
    assert example.boxes.tolist() == [[2, 3, 6, 8]]
    assert example.labels.tolist() == [2]
    assert example.picture.shape == (3, 12, 16)
    expected = torch.zeros(12, 16, dtype=torch.bool)
    expected[3:8, 2:6] = True
    assert int((example.masks[0] ^ expected).sum()) == 0
    assert found.notes[0] == (
        "1 boxes of instances_train2017 have no width or height and are left out"
    )
    assert "1 pictures of instances_train2017 have no boxes" in found.notes[1]


def test_another_picture_is_another_data_set(coco):
    first = read_coco(coco).fingerprint
    picture = np.full((12, 16, 3), 9, dtype=np.uint8)
    Image.fromarray(picture).save(coco / "train2017" / "8.png")
    read_coco.cache_clear()
    assert read_coco(coco).fingerprint != first
    (coco / "train2017" / "8.png").unlink()
    read_coco.cache_clear()
    with pytest.raises(DataError, match=r"train2017/8.png cannot be read: No such file"):
        read_coco(coco)


def test_a_test_part_alone_is_not_chosen_by(coco):
    """Without val, validation is held out of train."""
    (coco / "annotations" / "instances_val2017.json").rename(
        coco / "annotations" / "instances_test2017.json"
    )
    (coco / "val2017").rename(coco / "test2017")
    found = read_coco(coco)
    assert (len(found.train), len(found.validation), len(found.test)) == (1, 1, 3)


def test_crowds_are_kept_for_judging_and_marked(coco):
    crowded = next(e for e in read_coco(coco).test.take(torch.arange(3)) if len(e.labels) == 2)
    assert crowded.is_crowd.tolist() == [False, True]
    assert crowded.masks is None


def without(key, at=0):
    found = annotations()
    del found["annotations"][at][key]
    return found


def with_value(key, value, at=0):
    found = annotations()
    found["annotations"][at][key] = value
    return found


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (with_value("category_id", 5), r"has the class 5, and the categories are 3, 18"),
        (with_value("image_id", 5), r"is of picture 5, which images does not have"),
        (with_value("bbox", [1, 2, 3]), r"has the box \[1, 2, 3\]; give \[x, y, width, height\]"),
        (with_value("bbox", ["a", 2, 3, 4]), r"has the box \['a', 2, 3, 4\]; give"),
        (with_value("bbox", [math.nan, 2, 3, 4]), r"has the box \[nan, 2, 3, 4\]; give"),
        (annotations(images=[{"id": 7, "file_name": "7.png", "height": 12}]),
         r"picture 7 of .*train2017.json has no width; give file_name, height and width"),
        (without("segmentation"), r"has no mask; give a segmentation, or take --task detection"),
        (without("bbox"), r"is no annotation file as COCO's \(KeyError"),
        ([], r"is no annotation file as COCO's"),
        (annotations(annotations=[]), r"no picture of .*train2017.json has a box"),
        (annotations(categories=[{"id": 3, "name": "x"}, {"id": 18, "name": "dog"}]),
         r"has the classes cat, dog, and the training part x, dog"),
    ],
)  # fmt: skip
def test_annotations_that_are_wrong_are_refused_in_a_sentence(coco, content, complaint):
    write(coco, content)
    with pytest.raises(DataError, match=complaint):
        read_coco(coco, masks=True)


def test_boxes_that_reach_out_of_their_pictures_are_counted(coco):
    assert not any("reach out" in note for note in read_coco(coco).notes)
    write(coco, with_value("bbox", [8, 6, 10, 9]))  # its corners, read as a width and a height
    read_coco.cache_clear()
    notes = " ".join(read_coco(coco).notes)
    assert "1 boxes of instances_train2017 reach out of their pictures; a box is [x, y" in notes


def test_missing_files_are_named(coco, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not there; put a folder annotations"):
        read_coco(tmp_path / "nowhere")
    (coco / "val2017").rename(coco / "elsewhere")
    with pytest.raises(DataError, match=r"is there, but its pictures are not; put them into"):
        read_coco(coco)
    (coco / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(DataError, match=r"annotations has val2017; it needs instances_train.json"):
        read_coco(coco)


def test_a_picture_of_another_size_is_refused(coco):
    Image.fromarray(np.zeros((5, 6, 3), dtype=np.uint8)).save(coco / "val2017" / "7.png")
    with pytest.raises(DataError, match=r"7.png is 6 by 5 pixels, and .* says 16 by 12"):
        read_coco(coco).test.take(torch.arange(3))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"size": [5, 6], "counts": [30]},
            r"has a mask of 6 by 5 pixels, and the picture is 16 by",
        ),
        ([["a"]], r"has the mask \[\['a'\]\]; give polygons"),
        ([[1, 2, 3, 4]], r"has the mask \[\[1, 2, 3, 4\]\]"),
    ],
)
def test_masks_of_another_size_or_form_are_refused(given, complaint):
    with pytest.raises(DataError, match=complaint):
        mask_of(given, (12, 16), "here")


OWN = """
import torch
def make():
    boxes = torch.tensor({boxes})
    example = (torch.rand(1, 16, 16), {{"boxes": boxes, "labels": {labels}, "masks": {masks}}})
    return {{"train": [example] * 20, "test": [example] * 3, "num_classes": 2}}
"""
BOXES = "[[1.0, 2, 8, 9]]"


@pytest.mark.parametrize(
    ("labels", "masks", "complaint"),
    [
        ("torch.tensor([3])", "torch.zeros(1, 16, 16)", r"classes from 3 to 3; .* which is 2"),
        ("torch.tensor([0])", "torch.zeros(1, 16, 16)", r"classes from 0 to 0"),
        ("torch.tensor([1, 2])", "torch.zeros(1, 16, 16)", r"has 1 boxes and 2 labels"),
        ("torch.tensor([1])", "torch.zeros(1, 9, 16)", r"masks of shape \(1, 9, 16\); give one"),
    ],
)
def test_data_sets_of_a_function_are_checked(tmp_path, labels, masks, complaint):
    path = tmp_path / "own.py"
    path.write_text(OWN.format(boxes=BOXES, labels=labels, masks=masks))
    read_given_boxes.cache_clear()
    with pytest.raises(DataError, match=complaint):
        read_given_boxes(f"{path}:make", masks=True)


@pytest.mark.parametrize(
    ("boxes", "complaint"),
    [
        ("[[8.0, 8, 3, 3]]", r"has the box \[8.0, 8.0, 3.0, 3.0\], of no width .*give corners"),
        ("[[float('nan'), 2, 8, 9]]", r"has the box \[nan, 2.0, 8.0, 9.0\]"),
        ("[[0.1, 0.2, 0.8, 0.9]]", r"give corners in pixels, not as shares of the picture"),
        ("[1.0, 2, 8, 9]", r"has boxes of shape \(4,\); a target is"),
    ],
)
def test_boxes_of_a_function_are_corners_in_pixels(tmp_path, boxes, complaint):
    path = tmp_path / "own.py"
    path.write_text(OWN.format(boxes=boxes, labels="torch.tensor([1])", masks="None"))
    read_given_boxes.cache_clear()
    with pytest.raises(DataError, match=complaint):
        read_given_boxes(f"{path}:make")


FULL = "(example[0], {'boxes': [[1.0, 2, 8, 9]], 'labels': [1]})"


def bare_data(tmp_path, train, test):
    """Data sets of pictures without boxes, but where they are put by hand."""
    path = tmp_path / "bare.py"
    text = OWN.format(boxes="[]", labels="torch.tensor([])", masks="None")
    text = text.replace("[example] * 20", train).replace("[example] * 3", test)
    path.write_text(text)
    read_given_boxes.cache_clear()
    return f"{path}:make"


@pytest.mark.parametrize(
    ("train", "test", "complaint"),
    [
        ("[example] * 20", f"[{FULL}] * 3", r"none of the 18 train pictures has a box, so there"),
        (f"[{FULL}] * 20", "[example] * 3", r"none of the 3 test pictures has a box"),
    ],
)
def test_a_part_without_any_box_is_refused(tmp_path, train, test, complaint):
    with pytest.raises(DataError, match=complaint):
        read_given_boxes(bare_data(tmp_path, train, test))


def test_first_pictures_without_boxes_are_told(tmp_path):
    name = bare_data(tmp_path, f"[example] * 80 + [{FULL}]", f"[example] + [{FULL}]")
    notes = read_given_boxes(name).notes
    assert notes[0] == "the first 64 of 73 train pictures have no boxes"
    assert set(notes[1:]) <= {"the first 8 of 8 validation pictures have no boxes"}


def test_data_sets_of_a_function_are_read(tmp_path):
    path = tmp_path / "fine.py"
    path.write_text(
        OWN.format(boxes=BOXES, labels="torch.tensor([2])", masks="torch.ones(1, 16, 16)")
    )
    found = read_given_boxes(f"{path}:make", masks=True)
    assert (len(found.train), len(found.validation), len(found.test)) == (18, 2, 3)
    assert found.input_shape == (1, 16, 16)
    assert found.train[0].labels.tolist() == [2]


def example(boxes, labels):
    masks = torch.zeros(len(boxes), 20, 20, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return Annotated(
        picture=torch.zeros(1, 20, 20),
        boxes=torch.tensor(boxes).float(),
        labels=torch.tensor(labels),
        masks=masks,
    )


TRUTH = [example([[2, 2, 8, 8]], [1]), example([[5, 5, 15, 15]], [1])]


def found_by(boxes, scores):
    """A detector that finds one object of the first class in each picture."""

    def model(images):
        picked = [answers.pop(0) for _ in images]
        return [
            {"boxes": torch.tensor([box]).float(), "scores": torch.tensor([score]),
             "labels": torch.tensor([1]), "masks": example([box], [1]).masks[:, None].float()}
            for box, score in picked
        ]  # fmt: skip

    answers = list(zip(boxes, scores, strict=True))
    return model


@pytest.mark.parametrize(
    ("boxes", "scores", "expected"),
    [
        ([[2, 2, 8, 8], [5, 5, 15, 15]], [0.9, 0.8], 1.0),
        ([[2, 2, 8, 8], [0, 0, 3, 3]], [0.9, 0.8], 51 / 101),  # half is found: recall to 0.5
        ([[0, 0, 1, 1], [5, 5, 15, 15]], [0.9, 0.8], 0.5 * 51 / 101),  # after a wrong one
        ([[0, 0, 1, 1], [0, 0, 1, 1]], [0.9, 0.8], 0.0),
    ],
)
def test_average_precision_is_cocos(boxes, scores, expected):
    part = Part.of(Drawn(lambda at: TRUTH[at], 2))
    found = average_precisions(found_by(boxes, scores), part, torch.device("cpu"), masks=True)
    assert found["ap"] == pytest.approx(expected, abs=1e-6)
    assert found["mask_ap"] == pytest.approx(expected, abs=1e-6)
    assert "ap_large" not in found


def test_mirroring_moves_boxes_and_masks_with_the_picture():
    torch.manual_seed(0)
    picture = torch.rand(1, 20, 20)
    target = {"boxes": torch.tensor([[2.0, 3, 8, 9]]), "masks": torch.rand(1, 20, 20)}
    seen = set()
    for _ in range(20):
        batch = mirrored(Images(images=[picture], targets=[target]))
        is_mirrored = torch.equal(batch.images[0], picture.flip(-1))
        expected = [[12.0, 3, 18, 9]] if is_mirrored else [[2.0, 3, 8, 9]]
        assert batch.targets[0]["boxes"].tolist() == expected
        masks = target["masks"].flip(-1) if is_mirrored else target["masks"]
        assert torch.equal(batch.targets[0]["masks"], masks)
        seen.add(is_mirrored)
    assert seen == {True, False}


def test_detectors_are_compared_from_pretrained_backbones(tmp_path):
    task = f"instance-segmentation:pretrain=1:head=4conv1fc:norms=heads:{OPTIONS}"
    result = compare(
        BACKBONE, norms=["frozen-bn", "gn:2+ws"], batch_sizes=[1], seeds=[1], limit=4, data=SCENES,
        task=task, recipe={"steps": 2, "base_lr": 0.01, "lr_batch_size": None}, out=tmp_path,
    )  # fmt: skip
    assert result.comparison.metric == "ap"
    records = read_records(tmp_path, TrainingRecord).records
    assert [record.outcome.status for record in records] == ["finished", "finished"]
    for record in records:
        assert {"ap", "ap50", "mask_ap", "mask_ap75"} <= record.outcome.scores.keys()
        assert all(0 <= value <= 1 for value in record.outcome.scores.values())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"augment": ("crop",)}, r"--augment crop was given, and --task instance-segmentation"),
        ({"mixup": 0.2}, r"--mixup 0.2 was given"),
        ({"data": "digits"}, r"there is no data 'digits' with boxes; write scenes, coco, folder"),
        ({"task": "detection:backbones=/nowhere"}, r"/nowhere is no folder; give the folder"),
        ({"task": "detection:head=3fc"}, r"detection:head was given '3fc'.*2fc or 4conv1fc"),
        ({"model": "mlp"}, r"has no parts that give feature maps"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_run(changes, complaint):
    protocol = PROTOCOL.model_copy(update=changes)
    sweep = SweepSpec(protocol=protocol, norms=("gn:2",), batch_sizes=(2,), seeds=(1,))

    def check():
        task = parse_task(protocol.task)
        task.check(sweep, task.data(protocol))

    with pytest.raises((SpecError, DataError), match=complaint):
        check()


def test_single_objects_are_learned_from_scenes_only(coco):
    coco = coco.rename(coco.with_name("scenes of mine"))
    protocol = PROTOCOL.model_copy(
        update={"data": f"folder:{coco}", "task": "detection:pretrain=2", "limit": None}
    )
    sweep = SweepSpec(protocol=protocol, norms=("gn:2",), batch_sizes=(1,), seeds=(1,))
    task = parse_task(protocol.task)
    with pytest.raises(SpecError, match=r"detection:pretrain was given 2, and .* has no single"):
        task.check(sweep, task.data(protocol))


def test_a_dry_run_draws_pictures_of_cocos_size(monkeypatch, tmp_path):
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    protocol = PROTOCOL.model_copy(update={"data": "coco", "image_size": 64, "limit": 10})
    data, missing = parse_task(protocol.task).sample(protocol)
    assert "coco is not there; put a folder annotations" in missing
    assert data.input_shape == (3, 64, 64)
    sweep = SweepSpec(protocol=protocol, norms=("gn:2",), batch_sizes=(1,), seeds=(1,))
    (cell,) = estimate(sweep, data, most_examples=1)
    assert cell.num_steps == 2
    assert cell.peak_bytes > 0
