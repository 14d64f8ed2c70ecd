"""A run's task and data, by which its trained network is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from normkit.lab.spec import TrainingSpec
from normkit.lab.task import Held, PartName, Source, Task, finite_scores, parse_task
from normkit.passes import device_of

Values = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class _Alone:
    """What evaluations ask of a loop, for a network that other processes do not share."""

    network: nn.Module
    device: torch.device
    share: ClassVar = (0, 1)

    @property
    def model(self) -> nn.Module:
        """The network, as it is called."""
        return self.network


@dataclass(frozen=True, slots=True)
class Subject:
    """What a run was trained for.

    Args:
        spec: The run.
        data: Of its task.
    """

    spec: TrainingSpec
    data: Any

    @classmethod
    def of(cls, spec: TrainingSpec) -> Subject:
        """A run with the data of its task.

        Raises:
            NormError: If the data cannot be read.
        """
        return cls(spec, parse_task(spec.protocol.task).data(spec.protocol))

    @property
    def task(self) -> Task:
        """The run's task."""
        return parse_task(self.spec.protocol.task)

    def scores(self, model: nn.Module, held: Held) -> Values:
        """What the task says of a network in evaluation mode, in this process and float32."""
        run = self.task.start(self.spec, self.data, model)
        loop: Any = _Alone(model, device_of(model) or torch.device("cpu"))
        was_training = model.training
        model.eval()
        found = finite_scores(run.evaluate(loop, held))
        model.train(was_training)
        return dict(found)

    def batches(
        self, part: PartName, size: int, number: int | None = None
    ) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets of a part, as the task evaluates them.

        Args:
            part: Which examples.
            size: Examples of a batch.
            number: Batches, at most.
        """
        examples = self.task.examples(self.data, part)
        order = torch.arange(len(examples) if number is None else min(number * size, len(examples)))
        for index in order.split(size):
            yield _pair(examples, index)


def _pair(examples: Source, index: Int[Tensor, " b"]) -> tuple[Any, Any]:
    batch = examples.take(index)
    return batch.inputs, batch.targets
