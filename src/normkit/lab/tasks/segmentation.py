"""Semantic segmentation by DeepLabV3: the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import DataError, SpecError
from normkit.lab.arms import FROZEN
from normkit.lab.changes import BuiltModel
from normkit.lab.data.annotated import IGNORED, Drawn, Mapped, Part, Parts
from normkit.lab.data.known import Sample
from normkit.lab.data.maps import VOC_NUMBERS, open_maps, read_voc
from normkit.lab.data.sources import data_folder
from normkit.lab.device import seeded
from normkit.lab.evaluation import metrics_library, shared_out_singly
from normkit.lab.loading import Loading, read_ahead
from normkit.lab.models.build import apply_arm, build_model
from normkit.lab.models.detectors import freeze_batch_norms_, scaled
from normkit.lab.models.segmenters import SegmenterOptions, segmenter
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import Found, Held, PartName, Task, TaskRun, require_batches
from normkit.lab.tasks.detection import floating, refuse_unused, require_start
from normkit.lab.tasks.starting import start_backbone_, weights_in

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

SIDE = 513  # of a training picture of VOC
SMALLEST, LARGEST = 0.5, 2.0  # what a picture is scaled by before it is cropped
TRIED_SIDE = 64  # of the pictures that checks send through a network


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """A batch: pictures of one size, and the class of each of their pixels."""

    inputs: Float[Tensor, "n c h w"]
    classes: Int[Tensor, "n h w"]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def targets(self) -> Int[Tensor, "n h w"]:
        """The classes, as batches of all tasks call what is learned."""
        return self.classes

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return type(self)(inputs=self.inputs.to(device), classes=self.classes.to(device))


@dataclass(frozen=True, slots=True)
class MappedExamples:
    """Examples of a part, as batches of pictures of one size.

    Args:
        part: The examples.
        size: Height and width of a picture in a batch.
    """

    part: Part[Mapped]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.part)

    def take(self, index: Int[Tensor, " k"]) -> Maps:
        """The batch of the examples at these positions; what is missing at a border is ignored."""
        return batch_of([fitted(example, self.size) for example in self.part.take(index)])

    def batches(self, parts: Sequence[Int[Tensor, " b"]], loading: Loading) -> Iterator[Maps]:
        """The batches at these positions, changed at random as ``loading`` asks for."""
        return read_ahead(partial(self._batch, loading), parts, loading.num_workers)

    def _batch(self, loading: Loading, part: Int[Tensor, " b"]) -> Maps:
        return batch_of([self._changed(at, loading) for at in part.tolist()])

    def _changed(self, at: int, loading: Loading) -> Mapped:
        with seeded((loading.seed * 1_000_003 + at) % 2**63):
            example = self.part[at]
            if "crop" in loading.augment:
                example = cropped(example, self.size)
            if "flip" in loading.augment and torch.rand(()) < 0.5:
                example = Mapped(picture=example.picture.flip(-1), classes=example.classes.flip(-1))
            return fitted(example, self.size)


def batch_of(examples: Sequence[Mapped]) -> Maps:
    """Pictures of one size, scaled as the network gets them, and their maps."""
    pictures = torch.stack([floating(each.picture) for each in examples])
    return Maps(inputs=scaled(pictures), classes=torch.stack([each.classes for each in examples]))


def fitted(example: Mapped, size: tuple[int, int]) -> Mapped:
    """An example at a size: its centre where it is larger, and ignored pixels where smaller."""
    height, width = example.classes.shape
    y, x = (max(0, (own - side) // 2) for own, side in zip((height, width), size, strict=True))
    picture = example.picture[:, y : y + size[0], x : x + size[1]]
    classes = example.classes[y : y + size[0], x : x + size[1]]
    missing = (0, size[1] - classes.shape[1], 0, size[0] - classes.shape[0])
    return Mapped(
        picture=functional.pad(picture, missing),
        classes=functional.pad(classes, missing, value=IGNORED),
    )


def cropped(example: Mapped, size: tuple[int, int]) -> Mapped:
    """Scale an example by a random factor, and take a random part of it."""
    factor = SMALLEST + (LARGEST - SMALLEST) * float(torch.rand(()))
    height, width = (max(1, round(factor * side)) for side in example.classes.shape)
    picture = _resized(floating(example.picture)[None], (height, width), "bilinear")[0]
    classes = _resized(example.classes[None, None].float(), (height, width), "nearest")[0, 0].long()
    y, x = (
        int(torch.randint(max(0, own - side) + 1, ()))
        for own, side in zip((height, width), size, strict=True)
    )
    return Mapped(
        picture=picture[:, y : y + size[0], x : x + size[1]],
        classes=classes[y : y + size[0], x : x + size[1]],
    )


def _resized(
    x: Float[Tensor, "n c h w"], size: tuple[int, int], mode: str
) -> Shaped[Tensor, "n c a b"]:
    return functional.interpolate(x, size=size, mode=mode)


class SegmentationRun(TaskRun):
    """The training of a network that gives scores of each class for each pixel.

    Args:
        network: The network.
        task: Its options.
        spec: Of the run.
        data: What it is trained and judged on.
    """

    def __init__(
        self, network: nn.Module, task: Segmentation, spec: TrainingSpec, data: Parts[Mapped]
    ) -> None:
        super().__init__(network, MappedExamples(data.train, data.input_shape[1:]))
        self._task, self._spec, self._data = task, spec, data

    def begin_epoch(self, loop: Loop, num_epochs: int) -> None:
        """Before the first epoch, give the backbone what it has learned before."""
        if num_epochs == 0:
            body = loop.network.get_submodule("backbone")
            start_backbone_(body, self._spec, self._data, self._task.pretrain, self._task.backbones)

    def loss(self, model: nn.Module, part: Maps) -> Found:
        """The cross-entropy of the pixels that count."""
        scores = scores_of_pixels(model(part.inputs))
        total = functional.cross_entropy(
            scores, part.classes, ignore_index=IGNORED, reduction="sum"
        )
        return Found(total / (part.classes != IGNORED).sum().clamp(min=1))

    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Mean intersection over union of the classes, and the share of pixels that are right."""
        part = self._data.validation if held == "validation" else self._data.test
        number = self._data.num_classes + 1
        return pixel_scores(loop.model, part, number, loop.device, loop.share)


def scores_of_pixels(output: Any) -> Float[Tensor, "n k h w"]:
    """Scores, from what torchvision's networks give, a dict, or others, a tensor."""
    return output["out"] if isinstance(output, dict) else output


@torch.no_grad()
def pixel_scores(
    model: Any,
    part: Part[Mapped],
    num_classes: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """How well a network in evaluation mode tells pixels apart, each picture at its own size.

    Args:
        model: The network.
        part: Pictures and their maps.
        num_classes: With the background.
        device: Where the network is.
        share: This process's number and the number of processes, which share the pictures.

    Returns:
        ``miou``, the mean over the classes of intersection over union, counted over all pictures,
        of the classes that occur; and ``pixel_accuracy``.
    """
    library = metrics_library("classification")
    options = {"ignore_index": IGNORED, "sync_on_compute": share[1] > 1, "validate_args": False}
    union = library.MulticlassJaccardIndex(num_classes, average="macro", **options).to(device)
    right = library.MulticlassAccuracy(num_classes, average="micro", **options).to(device)
    for at, counts in shared_out_singly(len(part), *share):
        batch = batch_of([part[at]]).to(device)
        best = scores_of_pixels(model(batch.inputs)).argmax(1)
        for metric in (union, right) if counts else ():
            metric.update(best, batch.classes)
    return {"miou": union.compute().item(), "pixel_accuracy": right.compute().item()}


class Segmentation(SegmenterOptions, Task):
    """The class of each pixel, by DeepLabV3."""

    name: ClassVar = "segmentation"
    scores: ClassVar = ("miou", "pixel_accuracy")

    pretrain: int = Field(
        default=0, ge=0, description="epochs in which the backbone learns single objects first"
    )
    backbones: str | None = Field(
        default=None, description="a folder of weights, one network for each norm, or none"
    )
    freeze: bool = Field(
        default=False, description="yes or no: running statistics of batch norms stand still"
    )

    def files(self) -> tuple[Path, ...]:
        """The weights that backbones start from."""
        return weights_in(self.backbones)

    def data(self, protocol: Protocol) -> Parts[Mapped]:
        """Scenes, Pascal VOC with SBD, or a folder of pictures and maps."""
        return open_maps(protocol, protocol.image_size or SIDE)

    def examples(self, data: Parts[Mapped], part: PartName) -> MappedExamples:
        """Pictures and maps at the size of a training picture."""
        return MappedExamples(getattr(data, part), data.input_shape[1:])

    def sample(self, protocol: Protocol) -> Sample:
        """Random pictures of VOC's number; other data as they are."""
        if protocol.data != "voc":
            return Sample(self.data(protocol))
        return random_maps(protocol)

    def build(self, spec: TrainingSpec, data: Parts[Mapped]) -> BuiltModel:
        """DeepLabV3 on the run's backbone, with the run's norm throughout."""
        backbone = build_model(
            spec.protocol.model,
            num_classes=data.num_classes,
            input_shape=data.input_shape,
            seed=spec.seed,
            drop_path=spec.protocol.drop_path,
        ).model
        with seeded(spec.seed):
            network = segmenter(backbone, self, data.input_shape, data.num_classes + 1)
        built = apply_arm(
            network,
            spec.norm,
            batch_size=spec.batch_size,
            input_shape=data.input_shape,
            name=spec.protocol.model,
        )
        if self.freeze and not spec.norm.startswith(FROZEN):
            freeze_batch_norms_(built.model)
        return built

    def start(self, spec: TrainingSpec, data: Parts[Mapped], network: nn.Module) -> SegmentationRun:
        """Begin the training of a network."""
        return SegmentationRun(network, self, spec, data)

    def check(self, sweep: SweepSpec, data: Parts[Mapped]) -> None:
        """Find bad input before the first run; each network is sent a small batch."""
        require_batches(sweep, data.name, data.num_examples)
        require_start(self, sweep, data)
        refuse_unused(self.name, sweep.protocol, ("crop", "flip"), ("weights", "label_smoothing"))
        channels, *sides = data.input_shape
        shape = (channels, *(min(side, TRIED_SIDE) for side in sides))
        for norm in sweep.norms:
            for size in sweep.batch_sizes:
                spec = TrainingSpec(protocol=sweep.protocol, norm=norm, batch_size=size)
                require_training_step(self.build(spec, data).model, (min(size, 2), *shape), spec)


def require_training_step(model: nn.Module, shape: tuple[int, ...], spec: TrainingSpec) -> None:
    """Refuse a network that cannot be trained on batches of a size.

    Raises:
        SpecError: With what the network says, such as that a norm would see one value.
    """
    try:
        with torch.no_grad():
            model.train()(torch.zeros(shape))
    except (ValueError, RuntimeError) as error:
        raise SpecError(
            f"{spec.norm} cannot be trained at batch size {spec.batch_size} in "
            f"{spec.protocol.model}: {error}; give larger batches or pictures, or another norm"
        ) from error


def random_maps(protocol: Protocol) -> Sample:
    """As many random pictures as VOC and SBD have, with random classes."""
    side = protocol.image_size or SIDE
    drawn = partial(_random, side)
    train, validation, test = (Part.of(Drawn(drawn, number)) for number in VOC_NUMBERS)
    data = Parts(
        name="voc",
        num_classes=20,
        input_shape=(3, side, side),
        train=train,
        validation=validation,
        test=test,
    ).limited(protocol.limit)
    try:
        read_voc(data_folder() / "VOC2012", data_folder() / "sbd", side)
    except DataError as error:
        return Sample(data, str(error))
    return Sample(data)


def _random(side: int, at: int) -> Mapped:
    generator = torch.Generator().manual_seed(at)
    return Mapped(
        picture=torch.rand(3, side, side, generator=generator),
        classes=torch.randint(21, (side, side), generator=generator),
    )
