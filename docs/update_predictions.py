"""Train a small detector and a small segmentation network, and draw what they find.

    python docs/update_predictions.py

It takes minutes on one core. The figures are ``docs/images/task-detection.png`` and
``docs/images/task-segmentation.png``.
"""

from pathlib import Path
from typing import Any

import torch

from normkit.lab.figures import figure_file
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.detection import floating
from normkit.lab.tasks.segmentation import batch_of
from normkit.lab.train import train

IMAGES = Path(__file__).parent / "images"
NUM_SHOWN, SURE = 6, 0.5
DETECTION = Protocol(
    task=(
        "instance-segmentation:head=4conv1fc:norms=fpn+heads:channels=32:hidden=128:anchor=4:"
        "proposals=100:detections=20:rois=32:pretrain=8"
    ),
    model="small-resnet:width=8:blocks=1:stages=4",
    data="scenes:test=12",
    steps=1200,
    limit=2000,
    base_lr=0.02,
    lr_batch_size=None,
    clip=5.0,
    warmup=20,
    schedule="cosine",
)
SEGMENTATION = Protocol(
    task="segmentation:stride=8:rate=1:channels=32:pretrain=8",
    model="small-resnet:width=8:blocks=1:stages=3",
    data="scenes:test=12",
    steps=1000,
    limit=2000,
    base_lr=0.1,
    lr_batch_size=None,
    clip=5.0,
    schedule="polynomial",
)


def main() -> None:
    """Draw both figures."""
    draw_segmentation(IMAGES / "task-segmentation.png")
    draw_detection(IMAGES / "task-detection.png")


def draw_detection(path: Path) -> None:
    """Test scenes with the boxes and masks that are there, and below those that are found."""
    data = parse_task(DETECTION.task).data(DETECTION)
    model = train(TrainingSpec(protocol=DETECTION, norm="gn:8+ws", batch_size=2, seed=1))
    examples = data.test.take(torch.arange(NUM_SHOWN))
    with torch.no_grad():
        found = model([floating(example.picture) for example in examples])
    with figure_file(path, figsize=(2 * NUM_SHOWN, 4.2), layout="constrained") as figure:
        axes = figure.subplots(2, NUM_SHOWN)
        for at, (example, own) in enumerate(zip(examples, found, strict=True)):
            sure = own["scores"] > SURE
            masks = own["masks"][sure][:, 0] > SURE
            shown = (
                (example.boxes, example.labels, example.masks),
                (own["boxes"][sure], own["labels"][sure], masks),
            )
            for row, (boxes, labels, masks) in enumerate(shown):
                _scene(axes[row, at], example.picture[0], (boxes, labels, masks))
        axes[0, 0].set_ylabel("truth")
        axes[1, 0].set_ylabel("found")


def _scene(axes: Any, picture: torch.Tensor, shown: tuple) -> None:
    boxes, labels, masks = shown
    colours = picture[..., None].expand(-1, -1, 3).float() / 255
    colours = colours.clone()
    for mask in masks:
        colours[mask] = 0.6 * colours[mask] + 0.4 * torch.tensor([0.1, 0.6, 1.0])
    axes.imshow(colours.numpy())
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
        axes.plot(x, y, color="tab:orange", linewidth=1)
        axes.text(left, top - 1, str(label - 1), color="tab:orange", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_segmentation(path: Path) -> None:
    """Test scenes, the classes of their pixels, and below those that are found."""
    data = parse_task(SEGMENTATION.task).data(SEGMENTATION)
    model = train(TrainingSpec(protocol=SEGMENTATION, norm="bn+ws", batch_size=8, seed=1))
    examples = data.test.take(torch.arange(NUM_SHOWN))
    with torch.no_grad():
        found = model(batch_of(examples).inputs)["out"].argmax(1)
    with figure_file(path, figsize=(2 * NUM_SHOWN, 6.2), layout="constrained") as figure:
        axes = figure.subplots(3, NUM_SHOWN)
        for at, (example, classes) in enumerate(zip(examples, found, strict=True)):
            axes[0, at].imshow(example.picture[0], cmap="gray")
            for row, shown in ((1, example.classes), (2, classes)):
                axes[row, at].imshow(shown, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
            for row in range(3):
                axes[row, at].set_xticks([])
                axes[row, at].set_yticks([])
        for row, name in enumerate(("scene", "truth", "found")):
            axes[row, 0].set_ylabel(name)


if __name__ == "__main__":
    main()
