"""Adversarial training: pictures are attacked before a network is trained or judged on them."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from normkit.diagnostics.estimation_shift import estimation_shift
from normkit.errors import DataError, SpecError
from normkit.inference.tracked import tracked
from normkit.lab.check import check_pictures
from normkit.lab.data import Dataset, Examples, Split, stratified_order
from normkit.lab.data.dataset import SPLIT_SEED, Pictures
from normkit.lab.data.known import Sample
from normkit.lab.evaluation import require_scores, shared_out
from normkit.lab.spec import Protocol, SweepSpec, TrainingSpec
from normkit.lab.start import data_of
from normkit.lab.task import Found, Held, Task, TaskRun
from normkit.lab.tasks.attack import (
    Attack,
    PixelRange,
    autocast_of,
    buffers_kept,
    evaluation_mode,
)
from normkit.lab.tasks.classification import Classification

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

NUM_LOOKED_AT = 1000  # pictures whose range is looked at, where they are not in memory
DEPTH, DARK = 255.0, 128  # white of bytes; without such a pixel the brightest one is white
STARTS_SEED = 0  # of the random starts of attacks in evaluation
ROUNDING = 1e-4  # of the range, by which pixels may lie beyond it


def _fraction(value: Any) -> Any:
    """Read ``8/255`` as a number; anything else is left to the field's rule."""
    above, is_fraction, below = value.partition("/") if isinstance(value, str) else (value, "", "")
    if not is_fraction:
        return value
    try:
        return float(above) / float(below)
    except (ValueError, ZeroDivisionError):
        return value


Pixels = Annotated[float, BeforeValidator(_fraction)]
"""A length between black, 0, and white, 1, also written as a fraction such as 8/255."""


class Adversarial(Task):
    """Training on pictures that are attacked by projected gradient descent.

    The network is judged on attacked test pictures, ``robust``, and on plain ones, ``clean``. Both
    are normalised by the same running statistics; ``statistics`` says what these were learned from.
    ``attacked_shift`` and ``clean_shift`` tell how far they are from the statistics of each kind of
    test pictures, for networks that have running statistics.

    Source:
        Madry et al. 2018, arXiv:1706.06083.
    """

    name: ClassVar = "adversarial"
    scores: ClassVar = ("robust", "clean")
    further: ClassVar = ("attacked_shift", "clean_shift")

    epsilon: Pixels = Field(
        default=4 / 255,
        gt=0,
        le=1,
        description="how far a pixel may move, above 0 and at most 1, such as 8/255; "
        "--task classification trains without attacks",
    )
    step_size: Pixels = Field(
        default=2 / 255, gt=0, le=1, description="how far it moves in a step, such as 2/255"
    )
    steps: int = Field(
        default=4, ge=1, le=10_000, description="the steps of an attack in training, 1 or more"
    )
    test_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="the steps of an attack in evaluation, 1 or more, or none: as in training",
    )
    random_start: bool = Field(default=True, description="yes or no")
    attack_mode: Literal["eval", "train"] = Field(
        default="eval",
        description="eval or train: the mode in which the network gives a training attack its "
        "gradients",
    )
    statistics: Literal["attacked", "clean", "both", "every"] = Field(
        default="attacked",
        description="attacked, clean, both or every: the batches that running statistics are "
        "learned from",
    )
    clean_share: float = Field(
        default=0, ge=0, lt=1, description="the share of the clean batch in the loss, in [0, 1)"
    )
    test_pictures: int | None = Field(
        default=None, ge=1, description="the test pictures that are judged, at most, or none: all"
    )
    low: float | None = Field(
        default=None, description="the value of black before pictures are scaled, or none: 0"
    )
    high: float | None = Field(
        default=None,
        description="the value of white before pictures are scaled, or none: 255 of bytes, or the "
        "brightest if none is above 127, and 1 of pictures in floating point",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Adversarial:
        if self.statistics == "every" and self.attack_mode == "eval":
            raise SpecError(
                "adversarial:statistics=every learns from the passes of the attack, too, and in "
                "evaluation mode these are not learned from; give attack_mode=train with it"
            )
        return self

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a norm sees when, for the report."""
        mode = {
            "eval": "in evaluation mode, so by running statistics",
            "train": "in training mode, so by the statistics of the batch under attack",
        }[self.attack_mode]
        learned = {
            "attacked": "the attacked batches of the training steps",
            "clean": "the clean batches, in a pass of their own, while the loss normalises by the "
            "attacked batch",
            "both": "the clean and the attacked batch of each step, one after the other",
            "every": "every pass in training mode, those of the attack among them",
        }[self.statistics]
        mixed = f" (and by {self.clean_share:g} on the clean batch, in a pass of its own)"
        loss = (
            f"the loss is taken on attacked batches{mixed if self.clean_share else ''}; attacks "
            f"of {self.steps} steps get their gradients from the network {mode}"
        )
        running = (
            f"running statistics are learned from {learned}; the same ones judge clean and "
            f"attacked test pictures"
        )
        shift = (
            "attacked_shift and clean_shift are how far the running means are from the means of "
            "attacked and of clean test pictures, in standard deviations, as a mean over layers"
        )
        return loss, running, shift

    def data(self, protocol: Protocol) -> Dataset[Split]:
        """The data set of a protocol."""
        return data_of(protocol)

    def sample(self, protocol: Protocol) -> Sample:
        """Random pictures in place of a data set that papers name; others as they are."""
        return Classification().sample(protocol)

    def check(self, sweep: SweepSpec, data: Dataset[Split]) -> None:
        """Find bad input before the first run."""
        protocol = sweep.protocol
        if protocol.mixup:
            raise SpecError(
                f"--mixup was given {protocol.mixup:g}, but attacks raise the loss of one class "
                f"for each picture; leave it out"
            )
        two_passes = self.clean_share > 0 or self.statistics in ("clean", "both")
        if protocol.processes > 1 and two_passes:
            raise SpecError(
                f"{self} takes two passes in a step, which several processes do not; "
                f"leave clean_share and statistics out, or give one process"
            )
        check_pictures(sweep, data)
        self.pixels_of(data)

    def pixels_of(self, data: Dataset[Split]) -> PixelRange:
        """Black and white of a data set, as the network gets them.

        Raises:
            DataError: If pictures have pixels beyond black and white.
        """
        scaling, (least, most) = getattr(data.train, "scaling", None), _extremes(data.train)
        low, high = self._ends(least, most, is_bytes=scaling is not None)
        beyond = ROUNDING * (high - low)
        if low >= high or least < low - beyond or most > high + beyond:
            raise DataError(
                f"the pixels of {data.name} go from {least:.4g} to {most:.4g}, and epsilon is a "
                f"share of the way from black to white, which are taken for {low:g} and {high:g}; "
                f"give bytes, which are scaled for you, or say which values they are: "
                f"adversarial:low=...:high=..."
            )
        return PixelRange.of(scaling, low, high)

    def _ends(self, least: float, most: float, *, is_bytes: bool) -> tuple[float, float]:
        """The values of black and white of pictures with such pixels."""
        white = 1.0
        if is_bytes:
            white = DEPTH if most >= DARK else most
        return 0.0 if self.low is None else self.low, white if self.high is None else self.high

    def attack(self, pixels: PixelRange, num_steps: int) -> Attack:
        """The attack by so many steps."""
        return Attack(
            epsilon=self.epsilon,
            step_size=self.step_size,
            num_steps=num_steps,
            pixels=pixels,
            random_start=self.random_start,
        )

    def start(self, spec: TrainingSpec, data: Dataset[Split], network: nn.Module) -> AdversarialRun:
        """Begin the training of a network."""
        return AdversarialRun(self, spec.protocol, data, network)


class AdversarialRun(TaskRun):
    """The training of a network on attacked pictures.

    Args:
        task: Its options.
        protocol: Its label smoothing, precision and memory format.
        dataset: Training examples, and those that it is judged on.
        network: The network; attacks call it past compilation and the wrappers of processes.
    """

    def __init__(
        self, task: Adversarial, protocol: Protocol, dataset: Dataset[Split], network: nn.Module
    ) -> None:
        super().__init__(network, dataset.train)
        pixels = _range_of_sample(dataset) or task.pixels_of(dataset)
        self._task, self._protocol, self._num_classes = task, protocol, dataset.num_classes
        self._attack = task.attack(pixels, task.steps)
        self._test_attack = task.attack(pixels, task.test_steps or task.steps)
        judged = stratified_order(dataset.test.targets, SPLIT_SEED)[: task.test_pictures]
        self._held = {"validation": dataset.validation, "test": dataset.test.keep(judged)}

    def loss(self, model: nn.Module, part: Examples) -> Found:
        """The cross-entropy of the attacked batch, mixed with that of the clean one."""
        part = replace(part, inputs=self._laid_out(part.inputs))
        attacked = replace(part, inputs=self._laid_out(self._attacked(part)))
        share, learns = self._task.clean_share, self._task.statistics
        loss = torch.zeros((), device=part.inputs.device)
        if share or learns in ("clean", "both"):
            with torch.set_grad_enabled(share > 0), self._learning(learns in ("clean", "both")):
                loss = share * self._cross_entropy(model(part.inputs), part)
        with self._learning(learns != "clean"):
            scores = model(attacked.inputs)
        loss = (1 - share) * self._cross_entropy(scores, part) + loss
        return Found(loss, int((scores.argmax(1) == part.targets).sum()))

    def _learning(self, does: bool) -> Any:
        """Around a pass: whether running statistics learn from it."""
        return nullcontext() if does else buffers_kept(self.network)

    def _cross_entropy(self, scores: Any, part: Examples) -> Float[Tensor, ""]:
        require_scores(scores, len(part), self._num_classes)
        smoothing = self._protocol.label_smoothing
        return functional.cross_entropy(scores, part.targets, label_smoothing=smoothing)

    def _attacked(self, part: Examples) -> Float[Tensor, "n c h w"]:
        """The batch under a training attack, which moves running statistics only if it should."""
        task = self._task
        mode = evaluation_mode(self.network) if task.attack_mode == "eval" else nullcontext()
        autocast = autocast_of(self._protocol.precision, part.inputs.device)
        with mode, self._learning(task.statistics == "every"), autocast:
            return self._attack(self.network, part.inputs, part.targets)

    def _laid_out(self, inputs: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if not self._protocol.channels_last:
            return inputs
        return inputs.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """Shares of the attacked and of the clean examples that are right.

        Every evaluation attacks from the same starts, so that epochs can be compared. The shifts of
        the running statistics are measured on the first test pictures, of all classes alike.
        """
        split, shifts = self._held[held], dict[str, float]()
        starts = torch.Generator(loop.device).manual_seed(STARTS_SEED)
        right = torch.zeros(3, dtype=torch.float64, device=loop.device)
        for index in shared_out(len(split), *loop.share):
            part = split.take(index).to(loop.device)
            with autocast_of(self._protocol.precision, loop.device):
                attacked = self._test_attack(self.network, part.inputs, part.targets, starts)
            if held == "test" and not shifts:
                shifts = _shifts(self.network, attacked=attacked, clean=part.inputs)
            found = [loop.model(x).argmax(1) == part.targets for x in (attacked, part.inputs)]
            right += torch.stack([*(f.sum() for f in found), right.new_tensor(len(part))])
        if loop.share[1] > 1:
            torch.distributed.all_reduce(right)
        robust, clean, number = right.tolist()
        return {"robust": robust / number, "clean": clean / number} | shifts


def _shifts(network: nn.Module, **inputs: Float[Tensor, "n c h w"]) -> dict[str, float]:
    """How far the running statistics are from those of these inputs, in standard deviations.

    Root of the mean square over the channels of each layer, then the mean over layers. Nothing
    where no layer has running statistics, or none of these gets an input.
    """
    if not tracked(network):
        return {}
    found = dict[str, float]()
    with suppress(DataError):
        for name, x in inputs.items():
            _, *layers = estimation_shift(network, [x], normalize="std").layers
            found[f"{name}_shift"] = fmean(layer.esm_mean or 0.0 for layer in layers)
    return found


def _extremes(split: Split) -> tuple[float, float]:
    """The least and the largest value of pictures before they are scaled."""
    if isinstance(split, Pictures):
        return split.values.min().item(), split.values.max().item()
    values = split.take(torch.arange(min(NUM_LOOKED_AT, len(split)))).inputs
    scaling = getattr(split, "scaling", None)
    values = values if scaling is None else values * scaling.std + scaling.mean
    return values.min().item(), values.max().item()


def _range_of_sample(dataset: Dataset[Split]) -> PixelRange | None:
    """The range of a dry run's random pictures, which have mean 0 and standard deviation 1."""
    if hasattr(dataset.train, "scaling") or isinstance(dataset.train, Examples):
        return None
    return PixelRange.of(None, -2.0, 2.0)
