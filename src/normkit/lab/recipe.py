"""How a network is trained: optimizer, schedule, precision, augmentation, as one value."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from normkit.errors import SpecError
from normkit.lab.frozen import Count, Frozen

Optimizer = Literal["sgd", "nesterov", "adam", "adamw"]
Schedule = Literal["list", "step", "cosine", "polynomial", "exponential", "constant"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Augmentation = Literal["crop", "flip", "cutout", "imagenet"]
Share = Annotated[float, Field(gt=0, le=1)]
PositiveRate = Annotated[float, Field(gt=0)]

BETWEEN_EPOCHS = ("list", "step")
LR_BATCH_SIZE = 128  # the batch size that `base_lr` is stated for, if nothing else is said


class Recipe(Frozen):
    r"""How a network is trained.

    A step of the optimizer sees ``batch_size * accumulate`` examples on each process; a norm sees
    ``batch_size`` of them at a time.

    The learning rate starts from

    .. math::  \text{base\_lr} \cdot \text{examples of a step} / \text{lr\_batch\_size}

    or from ``base_lr`` itself where ``lr_batch_size`` is ``None``; :meth:`factor` says how it
    goes on.

    Example:
        >>> recipe = Recipe(optimizer="adamw", base_lr=1e-3, schedule="cosine", epochs=10)
        >>> recipe.first_rate(256) * recipe.factor(0.5)
        0.001
    """

    epochs: Count | None = Field(
        default=4, description="passes over the training data, 1 or more, or none with steps"
    )
    steps: Count | None = Field(
        default=None, description="steps of the optimizer, 1 or more, in place of epochs"
    )
    optimizer: Optimizer = Field(default="sgd", description="sgd, nesterov, adam or adamw")
    base_lr: float = Field(
        default=0.1, gt=0, description="the learning rate of a step of lr_batch_size examples"
    )
    lr_batch_size: Count | None = Field(
        default=LR_BATCH_SIZE,
        description="the examples of a step that base_lr is for, or none: it is not scaled",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="SGD's momentum, in [0, 1)")
    weight_decay: float = Field(default=1e-4, ge=0, description="weight decay, 0 or more")
    norm_weight_decay: float | None = Field(
        default=None,
        ge=0,
        description="weight decay of the norms' parameters, or none: as of all others",
    )
    decay_gamma_to: Literal[0, 1] = Field(
        default=0, description="0 or 1: what the norms' scales decay towards"
    )
    schedule: Schedule = Field(
        default="list",
        description="list, step, cosine, polynomial, exponential or constant",
    )
    lr_drops: tuple[Share, ...] = Field(
        default=(81 / 164, 122 / 164),
        description="the shares of the training after which the rate drops (schedule list)",
    )
    lr_values: tuple[Share, ...] = Field(
        default=(),
        description="the shares of the first rate after each drop (schedule list), or none: "
        "lr_factor at each",
    )
    lr_every: float = Field(
        default=30, gt=0, description="the epochs or steps between two drops (schedule step)"
    )
    lr_factor: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="what the rate is multiplied by at a drop, or to its end (exponential)",
    )
    lr_power: float = Field(default=0.9, gt=0, description="the power of a polynomial schedule")
    warmup: float = Field(
        default=0, ge=0, description="the epochs, or steps, in which the rate grows from 0"
    )
    accumulate: Count = Field(
        default=1, description="the batches whose gradients are added for a step, 1 or more"
    )
    clip: float | None = Field(
        default=None, gt=0, description="the largest norm of the gradient, or none"
    )
    augment: tuple[Augmentation, ...] = Field(
        default=(), description="crop, flip, cutout, imagenet, or several with commas between"
    )
    label_smoothing: float = Field(default=0, ge=0, lt=1, description="a share in [0, 1)")
    mixup: float = Field(default=0, ge=0, description="mixup's alpha, or 0 for none")
    drop_path: float = Field(
        default=0, ge=0, lt=1, description="the share of residual branches that is left out"
    )
    precision: Precision = Field(default="32-true", description="32-true, bf16-mixed or 16-mixed")
    compile: bool = Field(default=False, description="yes or no")
    channels_last: bool = Field(default=False, description="yes or no")

    @model_validator(mode="before")
    @classmethod
    def _steps_in_place_of_epochs(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("steps") is not None:
            return {"epochs": None} | values
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "Recipe":
        if (self.epochs is None) == (self.steps is None):
            raise SpecError(
                f"a recipe was given epochs={self.epochs} and steps={self.steps}; give one of them"
            )
        if self.lr_values and len(self.lr_values) != len(self.lr_drops):
            raise SpecError(
                f"a recipe was given {len(self.lr_values)} lr_values for {len(self.lr_drops)} "
                f"lr_drops; give one for each drop"
            )
        return self

    def first_rate(self, num_examples: int) -> float:
        """Learning rate after the warm-up, before any drop.

        Args:
            num_examples: Examples of a step of the optimizer, over all processes.

        Source:
            Gunawan et al., appendix B.1: ``0.1 * batch / 128``.
        """
        return self.base_lr * (num_examples / self.lr_batch_size if self.lr_batch_size else 1)

    def factor(self, share: float) -> float:
        r"""What the first learning rate is multiplied by when a share :math:`t` is done.

        ===========  =================================================================
        constant     1
        list         a factor ``lr_factor`` at each share in ``lr_drops``, or ``lr_values`` there
        step         a factor ``lr_factor`` every ``lr_every`` epochs (or steps)
        cosine       :math:`(1 + \cos \pi t) / 2`
        polynomial   :math:`(1 - t)^\text{lr\_power}`
        exponential  :math:`\text{lr\_factor}^t`
        ===========  =================================================================

        Args:
            share: Of the training, the warm-up left out, in [0, 1].
        """
        match self.schedule:
            case "list":
                num_drops = sum(share >= drop for drop in self.lr_drops)
                values = self.lr_values or [self.lr_factor**n for n in range(1, num_drops + 1)]
                return values[num_drops - 1] if num_drops else 1.0
            case "step":
                return self.lr_factor ** math.floor(share * self.length / self.lr_every)
            case "cosine":
                return (1 + math.cos(math.pi * share)) / 2
            case "polynomial":
                return (1 - share) ** self.lr_power
            case "exponential":
                return self.lr_factor**share
            case _:
                return 1.0

    @property
    def sentence(self) -> str:
        """The recipe in words, what is left at nothing left out.

        Example:
            >>> Recipe(schedule="cosine", clip=1.0).sentence.partition(", momentum")[0]
            'sgd, learning rate 0.1 x examples of a step / 128, cosine'
        """
        scaled = f" x examples of a step / {self.lr_batch_size}" if self.lr_batch_size else ""
        said = [self.optimizer, f"learning rate {self.base_lr:g}{scaled}", self.schedule_said]
        if self.optimizer in ("sgd", "nesterov"):
            said.append(f"momentum {self.momentum:g}")
        said.append(f"weight decay {self.weight_decay:g} on every parameter")
        if self.norm_weight_decay is not None:
            said[-1] = f"weight decay {self.weight_decay:g}, of norms {self.norm_weight_decay:g}"
        said += ["norms' scales decay towards 1"] if self.decay_gamma_to else []
        rest = ("warmup", "clip", "label_smoothing", "mixup", "drop_path")
        said += [f"{n.replace('_', ' ')} {getattr(self, n):g}" for n in rest if getattr(self, n)]
        said += [f"gradients of {self.accumulate} batches added"] if self.accumulate > 1 else []
        said += [f"augmented by {' and '.join(self.augment)}"] if self.augment else []
        said += [self.precision] if self.precision != "32-true" else []
        said += [n.replace("_", " ") for n in ("compile", "channels_last") if getattr(self, n)]
        return ", ".join(said)

    @property
    def schedule_said(self) -> str:
        """The schedule in words."""
        match self.schedule:
            case "list":
                shares = " and ".join(f"{100 * drop:.0f} %" for drop in self.lr_drops)
                if self.lr_values:
                    values = " and ".join(f"{value:g}" for value in self.lr_values)
                    return f"{values} of it after {shares} of the training"
                return f"times {self.lr_factor:g} after {shares} of the training"
            case "step":
                return f"times {self.lr_factor:g} every {self.lr_every:g} epochs"
            case "polynomial":
                return f"polynomial of power {self.lr_power:g}"
            case "exponential":
                return f"exponential to {self.lr_factor:g} of it"
            case _:
                return self.schedule

    @property
    def length(self) -> int:
        """Epochs, or steps where the recipe counts those."""
        return self.epochs or self.steps or 1


@dataclass(frozen=True, slots=True)
class Timetable:
    """The steps of a training, and the learning rate of each.

    ``list`` and ``step`` change the rate between epochs, where the recipe counts epochs; the other
    schedules change it at every step. In the warm-up it grows by equal parts to the first rate.

    Args:
        recipe: Says how.
        steps_per_epoch: Steps of the optimizer in an epoch.
        step_examples: Examples of a step, over all processes.
    """

    recipe: Recipe
    steps_per_epoch: int
    step_examples: int

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        if self.recipe.steps is not None:
            return self.recipe.steps
        return self.recipe.length * self.steps_per_epoch

    @property
    def num_epochs(self) -> int:
        """Epochs, of which the last may be cut short."""
        return self.recipe.epochs or -(-self.num_steps // self.steps_per_epoch)

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the warm-up, fewer than there are in all."""
        per_unit = 1 if self.recipe.epochs is None else self.steps_per_epoch
        return min(round(self.recipe.warmup * per_unit), self.num_steps - 1)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        first, warmup = self.recipe.first_rate(self.step_examples), self.num_warmup_steps
        if step < warmup:
            return first * (step + 1) / warmup
        if self.recipe.schedule in BETWEEN_EPOCHS and self.recipe.epochs is not None:
            return first * self.recipe.factor(step // self.steps_per_epoch / self.recipe.epochs)
        return first * self.recipe.factor((step - warmup) / (self.num_steps - warmup))
