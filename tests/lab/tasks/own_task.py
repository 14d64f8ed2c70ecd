"""A task that the engine does not know: how much of a picture is bright."""

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from normkit.lab.data.known import Sample
from normkit.lab.start import data_of
from normkit.lab.task import Found, Task, TaskRun


class BrightnessRun(TaskRun):
    """The first output is the mean of the picture; a term grows with the steps that were done."""

    def __init__(self, network, data, weight):
        super().__init__(network, data.train)
        self.data, self.weight = data, weight
        self.num_seen = torch.zeros(1)

    def parameters(self, network, recipe):
        first, *rest = network.parameters()
        return [{"params": [first], "lr_scale": 0.0}, {"params": rest}]

    def begin_step(self, loop, num_steps, parts):
        self.num_seen += 1

    def loss(self, model, part):
        error = functional.mse_loss(model(part.inputs)[:, 0], part.inputs.mean((1, 2, 3)))
        return Found(error * (1 + self.weight * self.num_seen.item()))

    def evaluate(self, loop, held):
        split = getattr(self.data, held)
        with torch.no_grad():
            found = loop.model(split.inputs)[:, 0]
        near = (found - split.inputs.mean((1, 2, 3))).abs() < 0.1
        return {"nearness": near.double().mean().item(), "seen": self.num_seen.item()}

    def state(self):
        return {"num_seen": self.num_seen}

    def load_state(self, state):
        self.num_seen = state["num_seen"]


class Brightness(Task):
    """How bright a picture is."""

    name: ClassVar = "brightness"
    scores: ClassVar = ("nearness",)
    weight: float = Field(default=0.1, ge=0, description="0 or more")
    doubled: bool = Field(default=False, description="yes or no")

    def data(self, protocol):
        whole = data_of(protocol)
        take = torch.arange(40)
        parts = {n: getattr(whole, n) for n in ("train", "validation", "test")}
        small = {n: p.take(take[: len(p)]) for n, p in parts.items()}
        return type(whole)(name=whole.name, num_classes=whole.num_classes, **small)

    def sample(self, protocol):
        return Sample(self.data(protocol))

    def start(self, spec, data, network):
        return BrightnessRun(network, data, self.weight)
