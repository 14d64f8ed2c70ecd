"""Detection of objects by Faster R-CNN, and of their masks by Mask R-CNN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from normkit.errors import SpecError
from normkit.lab.arms import Arm
from normkit.lab.changes import BuiltModel
from normkit.lab.data.annotated import Annotated, Part, Parts
from normkit.lab.data.detection import open_annotated, random_annotated
from normkit.lab.data.known import Sample
from normkit.lab.data.scenes import SCENES
from normkit.lab.evaluation import gather_states_, metrics_library, shared_out
from normkit.lab.loading import Loading, read_ahead
from normkit.lab.models.detectors import DetectorOptions, Pictures, detector
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import Found, Held, PartName, Task, TaskRun, require_batches
from normkit.lab.tasks.starting import classifier, kept_weights, start_backbone_, weights_in

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

EVALUATION_BATCH_SIZE = 4
SIDE, LARGEST = 800, 1333  # shorter and longer side of COCO's pictures, at most
SCORES = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
}
"""Ours, and torchmetrics' names for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A batch: pictures of any size, and what is in each, as torchvision's detectors take them."""

    images: list[Float[Tensor, "c h w"]]
    targets: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def inputs(self) -> list[Float[Tensor, "c h w"]]:
        """The pictures, as batches of all tasks call what the network gets."""
        return self.images

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return type(self)(
            images=[image.to(device) for image in self.images],
            targets=[{n: v.to(device) for n, v in each.items()} for each in self.targets],
        )


@dataclass(frozen=True, slots=True)
class Annotations:
    """Examples of a part, as batches.

    Args:
        part: The examples.
        masks: Whether masks are given.
    """

    part: Part[Annotated]
    masks: bool

    def __len__(self) -> int:
        return len(self.part)

    def take(self, index: Int[Tensor, " k"]) -> Images:
        """The batch of the examples at these positions."""
        found = self.part.take(index)
        return Images(
            images=[floating(each.picture) for each in found],
            targets=[self._target(each) for each in found],
        )

    def batches(self, parts: Sequence[Int[Tensor, " b"]], loading: Loading) -> Iterator[Images]:
        """The batches at these positions; a step mirrors its pictures itself."""
        return read_ahead(self.take, parts, loading.num_workers)

    def _target(self, example: Annotated) -> dict[str, Tensor]:
        counts = torch.ones(len(example.labels), dtype=torch.bool)
        if example.is_crowd is not None:
            counts = ~example.is_crowd
        target = {"boxes": example.boxes[counts], "labels": example.labels[counts]}
        if self.masks and example.masks is not None:
            target["masks"] = example.masks[counts].to(torch.uint8)
        return target


def floating(picture: Tensor) -> Float[Tensor, "c h w"]:
    """A picture with values in [0, 1]."""
    return picture if picture.is_floating_point() else picture.float() / 255


def mirrored(batch: Images) -> Images:
    """Mirror each picture from left to right one time in two, by torch's random state."""
    images, targets = list(batch.images), list(batch.targets)
    for at, image in enumerate(images):
        if torch.rand(()) < 0.5:
            images[at], targets[at] = image.flip(-1), _mirrored(targets[at], image.shape[-1])
    return Images(images=images, targets=targets)


def _mirrored(target: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    left, top, right, bottom = target["boxes"].unbind(1)
    found = target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    return found | ({"masks": target["masks"].flip(-1)} if "masks" in target else {})


class DetectionRun(TaskRun):
    """The training of a detector, which gives its losses itself.

    Args:
        network: The detector.
        task: Its options.
        spec: Of the run.
        data: What it is trained and judged on.
    """

    def __init__(
        self, network: nn.Module, task: Detection, spec: TrainingSpec, data: Parts[Annotated]
    ) -> None:
        super().__init__(network, Annotations(data.train, task.masks))
        self._task, self._spec, self._data = task, spec, data

    def begin_epoch(self, loop: Loop, num_epochs: int) -> None:
        """Before the first epoch, give the backbone what it has learned before."""
        if num_epochs == 0:
            body: Any = loop.network.get_submodule("backbone.body")
            task = self._task
            start_backbone_(body, self._spec, self._data, task.pretrain, task.backbones)

    def loss(self, model: nn.Module, part: Images) -> Found:
        """The sum of the detector's losses."""
        batch = mirrored(part) if "flip" in self._spec.protocol.augment else part
        losses = model(batch.images, batch.targets)
        return Found(torch.stack([*losses.values()]).sum())

    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Average precisions of boxes, and of masks if the detector gives them."""
        part = self._data.validation if held == "validation" else self._data.test
        return average_precisions(loop.model, part, loop.device, loop.share, self._task.masks)


@torch.no_grad()
def average_precisions(
    model: Any,
    part: Part[Annotated],
    device: torch.device,
    share: tuple[int, int] = (0, 1),
    masks: bool = False,
) -> dict[str, float]:
    """COCO's average precisions of a detector in evaluation mode.

    Args:
        model: The detector.
        part: Pictures and what is in them.
        device: Where the detector is.
        share: This process's number and the number of processes, which share the pictures.
        masks: Whether masks are judged too.

    Returns:
        ``ap``, the mean over thresholds, ``ap50``, ``ap75``, and by the size of the objects
        ``ap_small``, ``ap_medium`` and ``ap_large``: of boxes. With ``mask_`` before it of masks.
        What is of no object is left out.
    """
    library = metrics_library("detection")
    kinds = ("bbox", "segm") if masks else ("bbox",)
    metric = library.MeanAveragePrecision(iou_type=kinds, sync_on_compute=False)
    metric.warn_on_many_detections = False
    for index in shared_out(len(part), *share, EVALUATION_BATCH_SIZE):
        examples = part.take(index)
        found = model([floating(each.picture).to(device) for each in examples])
        metric.update(_predictions(found, masks), [_judged(each, masks) for each in examples])
    gather_states_(metric, len(part), share[1])
    values = metric.compute()
    prefixes = {"bbox": "", "segm": "mask_"}
    found = {
        f"{prefixes[kind]}{ours}": values[f"{kind}_{theirs}" if masks else theirs].item()
        for kind in kinds
        for ours, theirs in SCORES.items()
    }
    return {name: value for name, value in found.items() if value >= 0 or name.endswith("ap")}


def _predictions(found: Sequence[dict[str, Tensor]], masks: bool) -> list[dict[str, Tensor]]:
    names = ("boxes", "scores", "labels")
    kept = [{name: each[name].cpu() for name in names} for each in found]
    if masks:
        for each, own in zip(found, kept, strict=True):
            own["masks"] = each["masks"][:, 0].cpu() > 0.5
    return kept


def _judged(example: Annotated, masks: bool) -> dict[str, Tensor]:
    target = {"boxes": example.boxes, "labels": example.labels}
    if example.is_crowd is not None:
        target["iscrowd"] = example.is_crowd.long()
    if masks and example.masks is not None:
        target["masks"] = example.masks
    return target


class Detection(DetectorOptions, Task):
    """Boxes of objects."""

    name: ClassVar = "detection"
    scores: ClassVar = ("ap",)
    further: ClassVar = tuple(name for name in SCORES if name != "ap")

    pretrain: int = Field(
        default=0, ge=0, description="epochs in which the backbone learns single objects first"
    )
    backbones: str | None = Field(
        default=None, description="a folder of weights, one network for each norm, or none"
    )

    def files(self) -> tuple[Path, ...]:
        """The weights that backbones start from."""
        return weights_in(self.backbones)

    def data(self, protocol: Protocol) -> Parts[Annotated]:
        """Scenes, COCO, a folder like COCO's, or data sets of a user's function."""
        return open_annotated(protocol, self.masks)

    def examples(self, data: Parts[Annotated], part: PartName) -> Annotations:
        """Pictures, and what is in them."""
        return Annotations(getattr(data, part), self.masks)

    def sample(self, protocol: Protocol) -> Sample:
        """Random pictures of COCO's size; other data as they are."""
        if protocol.data != "coco":
            return Sample(self.data(protocol))
        return random_annotated(protocol, self.masks)

    def build(self, spec: TrainingSpec, data: Parts[Annotated]) -> BuiltModel:
        """A detector on the run's backbone."""
        largest = max(data.input_shape[1:])
        if data.input_shape[0] != 1:
            largest = round(data.input_shape[1] * LARGEST / SIDE)
        pictures = Pictures(shape=data.input_shape, largest=largest, num_classes=data.num_classes)
        arm = Arm.parse(spec.norm)
        return detector(classifier(spec, data), arm, self, pictures, spec.batch_size)

    def start(self, spec: TrainingSpec, data: Parts[Annotated], network: nn.Module) -> DetectionRun:
        """Begin the training of a detector."""
        return DetectionRun(network, self, spec, data)

    def check(self, sweep: SweepSpec, data: Parts[Annotated]) -> None:
        """Find bad input before the first run."""
        require_batches(sweep, data.name, data.num_examples)
        require_start(self, sweep, data)
        refuse_unused(self.name, sweep.protocol, ("flip",), ("weights", "label_smoothing"))
        super().check(sweep, data)


class InstanceSegmentation(Detection):
    """Boxes and masks of objects."""

    name: ClassVar = "instance-segmentation"
    scores: ClassVar = ("ap", "mask_ap")
    further: ClassVar = tuple(
        f"{kind}{name}" for kind in ("", "mask_") for name in SCORES if name != "ap"
    )
    masks: ClassVar = True


def require_start(task: Any, sweep: SweepSpec, data: Any) -> None:
    """Refuse a start that a task cannot give its backbone.

    Raises:
        NormError: If single objects are asked for and there are no scenes, or weights are missing.
    """
    if task.pretrain and sweep.protocol.data.partition(":")[0] != SCENES:
        raise SpecError(
            f"{task.name}:pretrain was given {task.pretrain}, and {data.name} has no single "
            f"objects to learn; leave it out, or give weights by backbones=FOLDER"
        )
    if task.backbones is not None:
        for norm in sweep.norms:
            kept_weights(Path(task.backbones).expanduser(), norm)


def refuse_unused(
    name: str, protocol: Protocol, known: Sequence[str], unused: Sequence[str]
) -> None:
    """Refuse options of the recipe that would be without effect in a task.

    Args:
        name: Of the task.
        protocol: What was asked for.
        known: The random changes that it can do to its examples.
        unused: Names of options that it does not read.

    Raises:
        SpecError: With what was given.
    """
    for option in unused:
        if getattr(protocol, option):
            spelled = f"--{option.replace('_', '-')}"
            raise SpecError(
                f"{spelled} was given {getattr(protocol, option)}, and --task {name} does not use "
                f"it; leave it out"
            )
    unknown = [change for change in protocol.augment if change not in known]
    if unknown or protocol.mixup:
        given = f"--augment {','.join(unknown)}" if unknown else f"--mixup {protocol.mixup:g}"
        raise SpecError(
            f"{given} was given, and --task {name} changes its pictures by "
            f"{', '.join(known) or 'nothing'} only; leave it out"
        )
