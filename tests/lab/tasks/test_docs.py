"""The pages on tasks say what is so: commands run, options and tables are the real ones."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import normkit as nk
from normkit.cli import main
from normkit.lab.device import threads_of
from normkit.lab.task import TASKS, parse_task
from normkit.lab.torchvision_ops import register_missing_operators, serve_detection
from pictures import fill

DOCS = Path(__file__).parents[3] / "docs"
NAMES = ("adversarial", "few-shot", "domain-adaptation", "search")
OTHERS = ("detection", "instance-segmentation", "segmentation", "video")  # other forms of data
FILES = {name: "detection" if name == OTHERS[1] else name for name in (*NAMES, *OTHERS)}
PAGES = {name: DOCS / "tasks" / f"{file}.md" for name, file in FILES.items()}
MODEL = """
from torch import nn
def make_model(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def update():
    spec = importlib.util.spec_from_file_location("update_tasks", DOCS / "update_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_task_has_its_page_and_a_row():
    overview = (DOCS / "tasks" / "README.md").read_text()
    for name in PAGES:
        scores = ", ".join(f"`{score}`" for score in parse_task(name).scores)
        assert re.search(rf"\| \[`{name}`\]\({FILES[name]}.md\) \|.*\| {scores} \|", overview)
    assert {*PAGES, "classification"} == {*TASKS}


@pytest.mark.parametrize("path", PAGES.values(), ids=list(PAGES))
def test_the_tables_of_a_page_are_those_of_the_records(path):
    page = path.read_text(encoding="utf-8")
    assert update().updated(page) == page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_every_option(name):
    page = PAGES[name].read_text()
    listed = re.findall(r"^\| (`[a-z_`, ]+`) \|", page.partition("## ")[0], re.MULTILINE)
    found = {option for cell in listed for option in re.findall(r"`(\w+)`", cell)}
    assert found == set(type(parse_task(name)).model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_with_a_model_and_pictures_of_ones_own_runs(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMKIT_SEARCHED", str(tmp_path / "searched"))
    shown = re.findall(r"```python\n(.*?)```", PAGES[name].read_text(), re.DOTALL)
    (tmp_path / "my.py").write_text("\n".join([MODEL, *shown]))
    for folder in ("photos", "drawings"):
        fill(tmp_path / folder, per_class=30, classes="abcdef")
    commands = re.findall(r"^    normkit (.*my\.py.*)$", PAGES[name].read_text(), re.MULTILINE)
    (command,) = commands
    assert main([*shlex.split(command), "--workers", "1"]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "compare" / "report.html").exists()


def write_coco(folder):
    """Six pictures for each part with the annotations of a cat or a dog."""
    (folder / "annotations").mkdir(parents=True)
    boxes = [[8, 6, 20, 30], [30, 20, 24, 16]]
    for part in ("train", "val"):
        fill(folder / part, per_class=6, size=(64, 48), classes=("",), seed=len(part))
        images = [
            {"id": at, "file_name": f"{at}.png", "width": 64, "height": 48} for at in range(6)
        ]
        annotations = [
            {"id": at, "image_id": at, "category_id": 1 + at % 2, "bbox": boxes[at % 2]}
            for at in range(6)
        ]
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{part}.json"
        path.write_text(json.dumps(content))


def write_maps(folder):
    for part in ("train", "val", "test"):
        fill(folder / part, per_class=6, size=(40, 32), classes=("images",))
        (folder / part / "maps").mkdir()
        for at in range(6):
            values = np.full((32, 40), at % 3, dtype=np.uint8)
            Image.fromarray(values).save(folder / part / "maps" / f"{at}.png")
    (folder / "classes.txt").write_text("background\nroad\ncar\n")


def write_clips(folder):
    for name in ("rise", "fall"):
        for at in range(21):
            fill(folder / "train" / name, per_class=3, size=(16, 16), classes=(f"{at}",), seed=at)


def test_the_tools_work_on_a_network_of_clips_as_the_page_shows(capsys):
    (shown,) = re.findall(r"```python\n(.*?)```", PAGES["video"].read_text(), re.DOTALL)
    register_missing_operators()
    exec(compile(shown, "video.md", "exec"), {})
    assert re.fullmatch(
        r"layers measured: 13\n.*\nnorms replaced: 12\nproblems at batch 1: \d+\n",
        capsys.readouterr().out,
    )


SMALL_HEADS = ":channels=8:hidden=16:proposals=20:rois=8:detections=5"
WRITTEN = {
    "detection": ("my-coco", write_coco, SMALL_HEADS),
    "segmentation": ("street", write_maps, ":stride=8:rate=1:channels=8"),
    "video": ("gestures", write_clips, ""),
}
"""The folder that a page describes, and options that make its network small."""


@pytest.mark.parametrize("name", WRITTEN)
def test_the_command_with_a_folder_of_ones_own_runs_on_a_small_network(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder, write, options = WRITTEN[name]
    write(tmp_path / folder)
    (command,) = re.findall(
        rf"^    normkit (.*folder:{folder}.*)$", PAGES[name].read_text(), re.MULTILINE
    )
    given = shlex.split(command)
    given[given.index("--task") + 1] += options
    given[given.index("--model") + 1] = "small-resnet:width=8:blocks=1:stages=3"
    given[given.index("--norms") + 1] = given[given.index("--norms") + 1].replace("32", "4")
    given[given.index("--batch-sizes") + 1] = "2"
    small = "--image-size 32 --limit 4 --seeds 1 --epochs 1 --workers 1 --base-lr 0.001"
    assert main([*given, *small.split()]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "compare" / "report.html").exists()


def small_pretrained(weights):
    """As what torchvision gives for these weights, with one block a stage, on small pictures."""
    from torchvision.models import detection, resnet
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d

    assert weights == "DEFAULT"
    options = {"width_per_group": 32, "norm_layer": FrozenBatchNorm2d}
    body = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], **options)
    return detection.FasterRCNN(
        _resnet_fpn_extractor(body, 3), num_classes=91, min_size=48, max_size=64,
        rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=50, box_batch_size_per_image=16,
    )  # fmt: skip


def test_a_pretrained_detector_is_converted_trained_and_judged(tmp_path, monkeypatch, capsys):
    serve_detection()
    from torchvision.models import detection

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detection, "fasterrcnn_resnet50_fpn", small_pretrained)
    write_coco(tmp_path / "my-coco")
    (block,) = re.findall(r"```python\n(.*?)```", PAGES["detection"].read_text(), re.DOTALL)
    found = {}
    torch.manual_seed(0)
    with threads_of(1):
        exec(compile(block, "detection.md", "exec"), found)
    lines = capsys.readouterr().out.splitlines()
    assert 0 <= float(lines[-1]) <= 1
    modules = [*found["model"].modules()]
    assert sum(isinstance(module, nk.GroupNorm) for module in modules) == 17
    assert not any("FrozenBatchNorm" in type(module).__name__ for module in modules)
