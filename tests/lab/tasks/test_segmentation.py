"""Semantic segmentation: the network, the data, and how it is judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn

from normkit.errors import DataError, SpecError
from normkit.lab.data.annotated import IGNORED, Drawn, Mapped, Part
from normkit.lab.data.maps import map_of_picture, read_maps, read_voc
from normkit.lab.loading import Loading
from normkit.lab.models.build import build_model
from normkit.lab.models.segmenters import SegmenterOptions, keep_stride_, segmenter
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.segmentation import MappedExamples, cropped, fitted, pixel_scores
from normkit.lab.train import run

SCENES = "scenes:items=digits:side=32:most=2:smallest=40:largest=70:test=6"
PROTOCOL = Protocol(
    data=SCENES, model="small-resnet:width=4:blocks=1:stages=3", limit=12, steps=2, base_lr=0.01,
    task="segmentation:stride=8:rate=1:channels=8:pretrain=1",
)  # fmt: skip


def test_the_last_stage_of_a_resnet_dilates_by_one_grid():
    model = build_model("torchvision:resnet50", num_classes=3, input_shape=(3, 64, 64)).model
    keep_stride_(model, 16, (3, 64, 64), "resnet50")
    by_stage = {
        stage: {(conv.dilation, conv.stride) for conv in model.get_submodule(stage).modules()
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)}
        for stage in ("layer3", "layer4")
    }  # fmt: skip
    assert by_stage["layer4"] == {((2, 2), (1, 1))}
    assert by_stage["layer3"] == {((1, 1), (2, 2)), ((1, 1), (1, 1))}


def test_two_stages_dilate_twice_as_much_each():
    model = build_model("torchvision:resnet18", num_classes=3, input_shape=(3, 64, 64)).model
    keep_stride_(model, 8, (3, 64, 64), "resnet18")
    dilations = [model.get_submodule(f"layer{at}.1.conv2").dilation for at in (2, 3, 4)]
    assert dilations == [(1, 1), (2, 2), (4, 4)]


def test_a_network_that_cannot_keep_its_stride_is_refused():
    model = build_model(PROTOCOL.model, num_classes=3, input_shape=(1, 32, 32)).model
    with pytest.raises(
        SpecError, match=r"cannot keep a stride of 4: its maps have strides 1, 2, 4, 8"
    ):
        segmenter(model, SegmenterOptions(stride=4), (1, 32, 32), 3)


def test_scores_are_as_large_as_the_picture():
    model = build_model(PROTOCOL.model, num_classes=3, input_shape=(1, 32, 40)).model
    network = segmenter(model, SegmenterOptions(stride=8, rate=1, channels=8), (1, 32, 40), 4)
    assert network.eval()(torch.zeros(1, 1, 32, 40))["out"].shape == (1, 4, 32, 40)


def miou_by_definition(maps, found, num_classes):
    counts = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for truth, best in zip(maps, found, strict=True):
        for a, b in zip(truth.flatten().tolist(), best.flatten().tolist(), strict=True):
            if a != IGNORED:
                counts[a, b] += 1
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    shares = [float(counts[k, k] / union[k]) for k in range(num_classes) if union[k]]
    return sum(shares) / len(shares), float(counts.diag().sum() / counts.sum())


def test_scores_of_pixels_match_their_definition():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(3, (4, 6, 5), generator=generator)  # of four classes the last never occurs
    maps[:, 0] = IGNORED
    found = torch.randint(3, (4, 6, 5), generator=generator)
    answers = iter(nn.functional.one_hot(found, 4).permute(0, 3, 1, 2).float())
    part = Part.of(Drawn(lambda at: Mapped(picture=torch.zeros(1, 6, 5), classes=maps[at]), 4))
    scores = pixel_scores(lambda x: next(answers)[None], part, 4, torch.device("cpu"))
    miou, accuracy = miou_by_definition(maps, found, 4)
    assert scores["miou"] == pytest.approx(miou, abs=1e-6)
    assert scores["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def numbered(height, width):
    values = torch.arange(height * width).view(height, width)
    return Mapped(picture=values[None].float(), classes=values)


def test_examples_are_fitted_to_a_size():
    small = fitted(numbered(3, 4), (5, 4))
    assert small.picture.shape == (1, 5, 4)
    assert bool((small.classes[3:] == IGNORED).all())
    assert torch.equal(small.classes[:3], numbered(3, 4).classes)
    large = fitted(numbered(9, 8), (3, 4))
    assert torch.equal(large.classes, numbered(9, 8).classes[3:6, 2:6])
    assert torch.equal(large.picture[0].long(), large.classes)


def test_a_random_part_has_the_picture_and_the_map_of_the_same_place():
    torch.manual_seed(0)
    classes = torch.zeros(40, 40, dtype=torch.int64)
    classes[:, 20:] = 1
    example = Mapped(picture=classes[None].float(), classes=classes)
    for _ in range(10):
        part = cropped(example, (16, 16))
        assert part.picture.shape[1:] == part.classes.shape
        assert max(part.classes.shape) <= 16
        assert ((part.picture[0] > 0.5).long() != part.classes).float().mean() < 0.1


def test_equal_seeds_change_pictures_equally():
    part = Part.of(Drawn(lambda at: numbered(20, 20), 3))
    examples = MappedExamples(part, (8, 8))
    order = [torch.tensor([0, 1]), torch.tensor([2])]
    first, again, other = (
        list(examples.batches(order, Loading(("crop", "flip"), seed))) for seed in (1, 1, 2)
    )
    assert [len(batch) for batch in first] == [2, 1]
    assert torch.equal(first[0].inputs, again[0].inputs)
    assert not torch.equal(first[0].inputs, other[0].inputs)


def write_picture(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


@pytest.fixture
def voc(tmp_path):
    """Pictures a and b of VOC's, b for the test; a, b and c of SBD's."""
    voc, sbd = tmp_path / "VOC2012", tmp_path / "sbd"
    for name in "abc":
        for folder in (voc / "JPEGImages", sbd / "img"):
            write_picture(folder / f"{name}.jpg", np.zeros((4, 5, 3)))
        write_picture(voc / "SegmentationClass" / f"{name}.png", np.full((4, 5), 1))
        (sbd / "cls").mkdir(exist_ok=True)
        content = {"Segmentation": np.full((4, 5), 2, dtype=np.uint8)}
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": content})
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for path, names in (
        (lists / "train.txt", "a"), (lists / "val.txt", "b"),
        (sbd / "train.txt", "a b"), (sbd / "val.txt", "c"),
    ):  # fmt: skip
        path.write_text("\n".join(names.split()) + "\n")
    read_voc.cache_clear()
    return voc, sbd


def test_voc_is_trained_with_the_maps_of_sbd_and_never_on_its_test(voc):
    found = read_voc(*voc, 9)
    train = [*found.train.take(torch.arange(len(found.train)))]
    train += found.validation.take(torch.arange(len(found.validation)))
    assert sorted(int(example.classes[0, 0]) for example in train) == [1, 2]  # a's map is VOC's
    assert [int(found.test[0].classes[0, 0]), len(found.test)] == [1, 1]
    assert (found.num_classes, found.input_shape) == (20, (3, 9, 9))


def test_missing_lists_and_folders_of_voc_are_named(voc, tmp_path):
    with pytest.raises(DataError, match=r"gone is not there; put img, cls, train.txt and val.txt"):
        read_voc(voc[0], tmp_path / "gone", 9)
    (voc[0] / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val.txt cannot be read"):
        read_voc(*voc, 9)


@pytest.fixture
def own(tmp_path):
    for at in range(12):
        write_picture(tmp_path / "train" / "images" / f"{at}.jpg", np.zeros((6, 7, 3)))
        write_picture(tmp_path / "train" / "maps" / f"{at}.png", np.full((6, 7), at % 3))
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    read_maps.cache_clear()
    return tmp_path


def test_a_folder_of_ones_own_is_read(own):
    found = read_maps(own, 8)
    sizes = (len(found.train), len(found.validation), len(found.test))
    assert sizes == (10, 1, 1)
    assert (found.num_classes, found.class_names) == (2, ("background", "cat", "dog"))


@pytest.mark.parametrize("name", ["images/3.jpg", "maps/3.png"])
def test_another_file_of_the_same_size_is_another_data_set(own, name):
    first = read_maps(own, 8).fingerprint
    read_maps.cache_clear()
    assert read_maps(own, 8).fingerprint == first
    path = own / "train" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    read_maps.cache_clear()
    assert read_maps(own, 8).fingerprint != first


def test_another_map_of_sbd_is_another_data_set(voc):
    first = read_voc(*voc, 9).fingerprint
    path = voc[1] / "cls" / "c.mat"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    read_voc.cache_clear()
    assert read_voc(*voc, 9).fingerprint != first


def all_of(parts):
    for part in (parts.train, parts.validation, parts.test):
        part.take(torch.arange(len(part)))


def test_wrong_maps_are_refused_in_a_sentence(own):
    maps = own / "train" / "maps"
    write_picture(maps / "0.png", np.full((6, 7), 9))
    with pytest.raises(DataError, match=r"0.png has the class 9, and there are 3, counted from 0"):
        all_of(read_maps(own, 8))
    write_picture(maps / "0.png", np.zeros((5, 7)))
    with pytest.raises(DataError, match=r"is 7 by 5 pixels, and its picture 7 by 6"):
        all_of(read_maps(own, 8))
    write_picture(maps / "0.png", np.zeros((6, 7, 3)))
    with pytest.raises(DataError, match=r"has the mode RGB; a map is a grey or palette picture"):
        map_of_picture(maps / "0.png")
    (maps / "0.png").unlink()
    read_maps.cache_clear()
    with pytest.raises(DataError, match=r"maps has no 0.png; give a map for each picture"):
        read_maps(own, 8)


def test_classes_are_named_a_line_the_background_first(own):
    path = own / "classes.txt"
    path.write_text("background\n cat\ndog\n\n", encoding="utf-8")
    assert read_maps(own, 8).class_names == ("background", "cat", "dog")
    path.write_text("background\n\n", encoding="utf-8")
    read_maps.cache_clear()
    with pytest.raises(DataError, match=r"classes.txt has 1 classes; give two or more, one a line"):
        read_maps(own, 8)
    path.unlink()
    with pytest.raises(DataError, match=r"has no classes.txt; write the name of a class a line"):
        read_maps(own, 8)


def test_a_pretrained_network_is_trained_and_judged():
    record = run(TrainingSpec(protocol=PROTOCOL, norm="gn:2+ws", batch_size=4, seed=1))
    assert record.outcome.status == "finished", record.outcome.message
    assert set(record.outcome.scores) == {"miou", "pixel_accuracy"}
    assert len(record.outcome.norms) == 14


def test_one_picture_at_a_time_is_refused_for_norms_over_the_batch():
    task = parse_task(PROTOCOL.task)
    sweep = SweepSpec(protocol=PROTOCOL, norms=("gn:2", "bn"), batch_sizes=(1,), seeds=(1,))
    with pytest.raises(SpecError, match=r"bn cannot be trained at batch size 1 in small-resnet"):
        task.check(sweep, task.data(PROTOCOL))


@pytest.mark.parametrize(
    ("given", "option"),
    [({"weights": "/gone"}, "--weights"), ({"label_smoothing": 0.1}, "--label")],
)
def test_options_without_effect_are_refused(given, option):
    protocol = PROTOCOL.model_copy(update=given)
    sweep = SweepSpec(protocol=protocol, norms=("gn:2",), batch_sizes=(4,), seeds=(1,))
    task = parse_task(protocol.task)
    with pytest.raises(SpecError, match=rf"{option}.* and --task segmentation does not use it"):
        task.check(sweep, task.data(protocol))


def test_norms_without_statistics_are_left_where_batch_norms_are_frozen():
    protocol = PROTOCOL.model_copy(update={"task": f"{PROTOCOL.task}:freeze=yes"})
    task = parse_task(protocol.task)
    spec = TrainingSpec(protocol=protocol, norm="gn:2", batch_size=4, seed=1)
    assert task.build(spec, task.data(protocol)).norms


def test_a_batch_of_ignored_pixels_has_no_loss():
    task = parse_task(PROTOCOL.task)
    data = task.data(PROTOCOL)
    spec = TrainingSpec(protocol=PROTOCOL, norm="gn:2", batch_size=2, seed=1)
    started = task.start(spec, data, task.build(spec, data).model)
    part = started.examples.take(torch.arange(2))
    ignored = replace(part, classes=torch.full_like(part.classes, IGNORED))
    assert started.loss(started.network, ignored).loss == 0
    assert started.loss(started.network, part).loss > 0
