"""Classification of pictures: cross-entropy, and the shares that are right."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.check import check_pictures
from normkit.lab.data import Dataset, Examples, Split
from normkit.lab.data.known import KNOWN, Sample, random_dataset
from normkit.lab.evaluation import ACCURACY, LOSS, TOP5, require_scores, scores_of
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.start import data_of
from normkit.lab.task import Found, Held, Task, TaskRun
from normkit.lab.torchvision_ops import register_missing_operators

if TYPE_CHECKING:
    from normkit.lab.loop import Loop


class ClassificationRun(TaskRun):
    """The training of a network that gives a score for each class.

    Args:
        network: The network.
        protocol: Its label smoothing, mixup and memory format.
        dataset: Training examples, and those that it is judged on.
    """

    def __init__(self, network: nn.Module, protocol: Protocol, dataset: Dataset[Split]) -> None:
        super().__init__(network, dataset.train)
        self._protocol, self._dataset = protocol, dataset
        self._mix = _mixup(protocol.mixup, dataset.num_classes) if protocol.mixup else None

    def loss(self, model: nn.Module, part: Examples) -> Found:
        """The cross-entropy of a batch."""
        inputs, targets = part.inputs, part.targets
        if self._mix is not None and len(part) > 1:
            inputs, targets = self._mix(inputs, targets)
        if self._protocol.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        scores = model(inputs)
        require_scores(scores, len(part), self._dataset.num_classes)
        smoothing = self._protocol.label_smoothing
        loss = functional.cross_entropy(scores, targets, label_smoothing=smoothing)
        return Found(loss, int((scores.argmax(1) == part.targets).sum()))

    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Shares of the examples that are right and among the best five, and the mean loss."""
        split = self._dataset.validation if held == "validation" else self._dataset.test
        return scores_of(loop.model, split, loop.device, loop.share)


class Classification(Task):
    """One class for each picture."""

    name: ClassVar = "classification"
    scores: ClassVar = (ACCURACY,)
    further: ClassVar = (LOSS, TOP5)

    def data(self, protocol: Protocol) -> Dataset[Split]:
        """The data set of a protocol."""
        return data_of(protocol)

    def sample(self, protocol: Protocol) -> Sample:
        """Random pictures in place of a data set that papers name; others as they are."""
        if protocol.data not in KNOWN:
            return Sample(data_of(protocol))
        return Sample(
            random_dataset(protocol.data, protocol.limit, protocol.hold_out, protocol.image_size),
            KNOWN[protocol.data].missing(),
        )

    def start(
        self, spec: TrainingSpec, data: Dataset[Split], network: nn.Module
    ) -> ClassificationRun:
        """Begin the training of a network."""
        return ClassificationRun(network, spec.protocol, data)

    def check(self, sweep: SweepSpec, data: Dataset[Split]) -> None:
        """Find bad input before the first run."""
        check_pictures(sweep, data)


def _mixup(alpha: float, num_classes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    register_missing_operators()
    transforms = importlib.import_module("torchvision.transforms.v2")
    return transforms.MixUp(alpha=alpha, num_classes=num_classes)
