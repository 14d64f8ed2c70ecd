"""Video recognition by TSM: the class of a clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import DataError
from normkit.lab.changes import BuiltModel
from normkit.lab.checkpoints.reading import read_weights
from normkit.lab.data import Examples
from normkit.lab.data.annotated import Drawn, Part, Parts
from normkit.lab.data.clips import Clip
from normkit.lab.data.frames import (
    SIDE,
    SOMETHING,
    SOMETHING_CLASSES,
    SOMETHING_NUMBERS,
    ClipFiles,
    frames_of,
    num_frames_of,
    open_clips,
    read_something,
    segments,
)
from normkit.lab.data.known import Sample
from normkit.lab.data.sources import data_folder
from normkit.lab.device import seeded
from normkit.lab.evaluation import metrics_library, require_scores, shared_out
from normkit.lab.loading import Loading, read_ahead
from normkit.lab.models.build import apply_arm, build_model
from normkit.lab.models.video import tsm
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.task import Found, Held, PartName, Task, TaskRun, require_batches
from normkit.lab.tasks.detection import floating, refuse_unused
from normkit.lab.tasks.segmentation import require_training_step, scaled
from normkit.lab.tasks.starting import kept_weights, load_backbone_, weights_in

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

EVALUATION_BATCH_SIZE = 8
TOP = 5
LEAST_AREA = 0.6  # sides of a random part of a frame, as a share of the frame's
AnyClip = Clip | ClipFiles


@dataclass(frozen=True, slots=True)
class ClipExamples:
    """Clips of a part, as batches ``(N, T, C, H, W)``.

    Args:
        part: The clips.
        num_frames: Frames that are taken of each.
    """

    part: Part[AnyClip]
    num_frames: int

    def __len__(self) -> int:
        return len(self.part)

    def take(self, index: Int[Tensor, " k"]) -> Examples:
        """The batch of the clips at these positions: the middle frame of each segment."""
        return batch_of([self._shown(self.part[at]) for at in index.tolist()])

    def batches(self, parts: Sequence[Int[Tensor, " b"]], loading: Loading) -> Iterator[Examples]:
        """The batches at these positions: a random frame of each segment."""
        return read_ahead(partial(self._batch, loading), parts, loading.num_workers)

    def _batch(self, loading: Loading, part: Int[Tensor, " b"]) -> Examples:
        return batch_of([self._changed(at, loading) for at in part.tolist()])

    def _shown(self, clip: AnyClip, chances: Tensor | None = None) -> tuple[Tensor, int]:
        index = segments(num_frames_of(clip), self.num_frames, chances)
        return floating(frames_of(clip, index)), clip.label

    def _changed(self, at: int, loading: Loading) -> tuple[Tensor, int]:
        with seeded((loading.seed * 1_000_003 + at) % 2**63):
            frames, label = self._shown(self.part[at], torch.rand(self.num_frames))
            return (cropped(frames) if "crop" in loading.augment else frames), label


def batch_of(clips: Sequence[tuple[Float[Tensor, "t c h w"], int]]) -> Examples:
    """Frames with values in [0, 1], scaled as the network gets them, and classes."""
    frames = torch.stack([frames for frames, _ in clips])
    inputs = scaled(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    return Examples(inputs=inputs, targets=torch.tensor([label for _, label in clips]))


def cropped(frames: Float[Tensor, "t c h w"]) -> Shaped[Tensor, "t c h w"]:
    """The same random part of each frame, at the frames' size."""
    size = frames.shape[2:]
    share = LEAST_AREA + (1 - LEAST_AREA) * float(torch.rand(()))
    sides = [max(1, round(share * side)) for side in size]
    y, x = (int(torch.randint(own - side + 1, ())) for own, side in zip(size, sides, strict=True))
    part = frames[:, :, y : y + sides[0], x : x + sides[1]]
    return functional.interpolate(part, size=size, mode="bilinear")


class VideoRun(TaskRun):
    """The training of a network that gives scores of each class of a clip.

    Args:
        network: The network.
        task: Its options.
        spec: Of the run.
        data: What it is trained and judged on.
    """

    def __init__(
        self, network: nn.Module, task: Video, spec: TrainingSpec, data: Parts[AnyClip]
    ) -> None:
        super().__init__(network, ClipExamples(data.train, task.frames))
        self._task, self._spec, self._data = task, spec, data

    def begin_epoch(self, loop: Loop, num_epochs: int) -> None:
        """Before the first epoch, read what the network has learned on pictures before."""
        if num_epochs == 0 and self._task.backbones is not None:
            path = kept_weights(Path(self._task.backbones).expanduser(), self._spec.norm)
            network = loop.network.get_submodule("network")
            head = [n for n, part in network.named_modules() if isinstance(part, nn.Linear)][-1:]
            own = {n: v for n, v in network.state_dict().items() if n.startswith(tuple(head))}
            load_backbone_(network, {**read_weights(path), **own}, str(path))

    def loss(self, model: nn.Module, part: Examples) -> Found:
        """The cross-entropy of a batch of clips."""
        scores = model(part.inputs)
        require_scores(scores, len(part), self._data.num_classes)
        loss = functional.cross_entropy(
            scores, part.targets, label_smoothing=self._spec.protocol.label_smoothing
        )
        return Found(loss, int((scores.argmax(1) == part.targets).sum()))

    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Shares of the clips whose class is the best one, and among the best five."""
        part = self._data.validation if held == "validation" else self._data.test
        examples = ClipExamples(part, self._task.frames)
        return clip_scores(loop.model, examples, self._data.num_classes, loop.device, loop.share)


@torch.no_grad()
def clip_scores(
    model: Any,
    examples: ClipExamples,
    num_classes: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Accuracies of a network in evaluation mode.

    Args:
        model: Gives scores of each clip.
        examples: Clips.
        num_classes: Their classes.
        device: Where the network is.
        share: This process's number and the number of processes, which share the clips.

    Returns:
        ``accuracy`` and ``top5_accuracy``.
    """
    accuracy = metrics_library("classification").MulticlassAccuracy
    options = {"average": "micro", "validate_args": False, "sync_on_compute": share[1] > 1}
    metrics = {
        "accuracy": accuracy(num_classes, **options).to(device),
        "top5_accuracy": accuracy(num_classes, top_k=min(TOP, num_classes), **options).to(device),
    }
    for index in shared_out(len(examples), *share, EVALUATION_BATCH_SIZE):
        part = examples.take(index).to(device)
        scores = model(part.inputs)
        for metric in metrics.values():
            metric.update(scores, part.targets)
    return {name: metric.compute().item() for name, metric in metrics.items()}


class Video(Task):
    """The class of a clip, by TSM."""

    name: ClassVar = "video"
    scores: ClassVar = ("accuracy", "top5_accuracy")

    frames: int = Field(default=8, ge=2, le=512, description="frames of a clip, 2 or more")
    backbones: str | None = Field(
        default=None, description="a folder of weights, one network for each norm, or none"
    )

    def files(self) -> tuple[Path, ...]:
        """The weights that backbones start from."""
        return weights_in(self.backbones)

    def data(self, protocol: Protocol) -> Parts[AnyClip]:
        """Clips that are drawn, Something-Something, or folders of frames."""
        return open_clips(protocol)

    def examples(self, data: Parts[AnyClip], part: PartName) -> ClipExamples:
        """Clips, of which the middle frame of each segment is taken."""
        return ClipExamples(getattr(data, part), self.frames)

    def sample(self, protocol: Protocol) -> Sample:
        """Random clips of Something-Something's number; other data as they are."""
        if protocol.data != SOMETHING:
            return Sample(self.data(protocol))
        return random_clips(protocol, self.frames)

    def build(self, spec: TrainingSpec, data: Parts[AnyClip]) -> BuiltModel:
        """TSM on the run's network, with the run's norm throughout."""
        name = spec.protocol.model
        network = build_model(
            name,
            num_classes=data.num_classes,
            input_shape=data.input_shape,
            seed=spec.seed,
            drop_path=spec.protocol.drop_path,
        ).model
        return apply_arm(
            tsm(network, self.frames, name),
            spec.norm,
            batch_size=spec.batch_size * self.frames,
            input_shape=(self.frames, *data.input_shape),
            name=name,
        )

    def start(self, spec: TrainingSpec, data: Parts[AnyClip], network: nn.Module) -> VideoRun:
        """Begin the training of a network."""
        return VideoRun(network, self, spec, data)

    def check(self, sweep: SweepSpec, data: Parts[AnyClip]) -> None:
        """Find bad input before the first run; each network is sent a clip."""
        require_batches(sweep, data.name, data.num_examples)
        refuse_unused(self.name, sweep.protocol, ("crop",), ("weights",))
        if self.backbones is not None:
            for norm in sweep.norms:
                kept_weights(Path(self.backbones).expanduser(), norm)
        shape = (1, self.frames, *data.input_shape)
        for norm in sweep.norms:
            for size in sweep.batch_sizes:
                spec = TrainingSpec(protocol=sweep.protocol, norm=norm, batch_size=size)
                require_training_step(self.build(spec, data).model, shape, spec)


def random_clips(protocol: Protocol, num_frames: int) -> Sample:
    """As many random clips as Something-Something has."""
    side = protocol.image_size or SIDE
    drawn = partial(_random, side, num_frames)
    train, validation, test = (Part.of(Drawn(drawn, number)) for number in SOMETHING_NUMBERS)
    data = Parts(
        name=SOMETHING,
        num_classes=SOMETHING_CLASSES,
        input_shape=(3, side, side),
        train=train,
        validation=validation,
        test=test,
    ).limited(protocol.limit)
    try:
        read_something(data_folder() / SOMETHING, side)
    except DataError as error:
        return Sample(data, str(error))
    return Sample(data)


def _random(side: int, num_frames: int, at: int) -> Clip:
    generator = torch.Generator().manual_seed(at)
    frames = torch.randint(256, (num_frames, 3, side, side), generator=generator)
    return Clip(frames=frames.to(torch.uint8), label=at % SOMETHING_CLASSES)
