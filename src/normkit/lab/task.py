"""What a task is: its data, the loss of a step, and the scores a network is judged by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from normkit import param_groups
from normkit.errors import SpecError
from normkit.lab.changes import BuiltModel
from normkit.lab.data.known import Sample
from normkit.lab.frozen import Frozen
from normkit.lab.recipe import Recipe
from normkit.lab.spec import Protocol as Settings
from normkit.lab.spec import SweepSpec, TrainingSpec
from normkit.lab.start import built

if TYPE_CHECKING:
    from normkit.lab.loop import Loop

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "classification": "normkit.lab.tasks.classification:Classification",
        "adversarial": "normkit.lab.tasks.adversarial:Adversarial",
        "few-shot": "normkit.lab.tasks.few_shot:FewShot",
        "domain-adaptation": "normkit.lab.tasks.domain_adaptation:DomainAdaptation",
        "search": "normkit.lab.tasks.search:Search",
        "detection": "normkit.lab.tasks.detection:Detection",
        "instance-segmentation": "normkit.lab.tasks.detection:InstanceSegmentation",
        "segmentation": "normkit.lab.tasks.segmentation:Segmentation",
        "video": "normkit.lab.tasks.video:Video",
    }
)
"""Module and class of each task; its file is imported when it is first asked for."""

Held = Literal["validation", "test"]
"""The examples that a network is judged on."""

PartName = Literal["train", "validation", "test"]


class Batch(Protocol):
    """What a step of training gets: pictures with classes, or with boxes, or clips."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        ...


class Source(Protocol):
    """The examples that an epoch goes through.

    A source may also have ``batches(parts, loading)``, which gives the batches at these positions
    with the random changes that ``loading`` asks for.
    """

    def __len__(self) -> int: ...

    def take(self, index: Int[Tensor, " k"], /) -> Any:
        """The batch of the examples at these positions."""
        ...


class TaskData(Protocol):
    """The data of a task; ``fingerprint`` changes when the files do, ``notes`` are for the user."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Twelve digits over everything that was read."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        ...

    @property
    def num_examples(self) -> int:
        """Training examples."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes that are told apart."""
        ...

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one input."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """What a batch gives in training.

    Args:
        loss: A scalar, the mean over the examples.
        num_right: Examples that were classified rightly; NaN where that says nothing.
    """

    loss: Float[Tensor, ""]
    num_right: float = math.nan


class TaskRun(ABC):
    """One network in training: the loss of a batch, and how the network is judged.

    Args:
        network: The network that is trained.
        examples: What an epoch goes through.
    """

    is_done = False
    """Whether the training ends here; read when an epoch has been judged on validation examples."""

    def __init__(self, network: nn.Module, examples: Source) -> None:
        self.network, self.examples = network, examples

    @abstractmethod
    def loss(self, model: nn.Module, part: Any) -> Found:
        """The loss of a batch.

        Args:
            model: The network, as it is called in training: compiled, or one of several processes.
            part: The batch, on the device.
        """

    @abstractmethod
    def evaluate(self, loop: Loop, held: Held) -> dict[str, float]:
        """The scores of the network, which is in evaluation mode.

        Args:
            loop: Has the model, the device and the precision.
            held: Which examples it is judged on.

        Returns:
            At least the task's scores, by name.
        """

    def order(self, generator: torch.Generator) -> Int[Tensor, " n"]:
        """The positions that an epoch goes through, in order."""
        return torch.randperm(len(self.examples), generator=generator)

    def parameters(self, network: nn.Module, recipe: Recipe) -> Any:
        """The parameters that the optimizer moves, or groups of them.

        A group's ``lr_scale`` multiplies the schedule's learning rate.
        """
        of_norms, towards = recipe.norm_weight_decay, recipe.decay_gamma_to
        if of_norms is None and not towards:
            return network.parameters()
        of_norms = recipe.weight_decay if of_norms is None else of_norms
        return param_groups(network, recipe.weight_decay, of_norms, decay_gamma_to=towards)

    def begin_epoch(self, loop: Loop, num_epochs: int) -> None:  # noqa: B027 - mostly nothing
        """Do what is due before an epoch.

        Args:
            loop: Has the model and the device.
            num_epochs: Epochs that are finished.
        """

    def begin_step(self, loop: Loop, num_steps: int, parts: Any) -> None:  # noqa: B027 - as above
        """Do what is due before a step.

        Args:
            loop: Has the model and the device.
            num_steps: Steps that are finished.
            parts: The batches of the step, on the device.
        """

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the network, its optimizer and the random states."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - as above
        """Go on from what :meth:`state` gave."""


class Task(Frozen, ABC):
    """What a network is trained for; the fields of a task are its options.

    On the command line it is written as ``NAME:option=value:option=value``.
    """

    name: ClassVar[str]
    scores: ClassVar[tuple[str, ...]]
    """What a network is judged by, the first one to be compared: shares; more is better."""
    costless: ClassVar[frozenset[str]] = frozenset()
    """Options that do not change what a step takes, such as the names of further data."""
    further: ClassVar[tuple[str, ...]] = ()
    """What evaluations give besides, which tables may read."""

    def __str__(self) -> str:
        """The name, and the options that are not at their defaults."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        return ":".join([self.name, *(f"{key}={_written(value)}" for key, value in given.items())])

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a report should say of it, such as what running statistics are learned from."""
        return ()

    @abstractmethod
    def data(self, protocol: Settings) -> Any:
        """The data of a protocol, as :class:`TaskData` describes it.

        Raises:
            NormError: If the data are unknown or cannot be read.
        """

    @abstractmethod
    def sample(self, protocol: Settings) -> Sample:
        """Random data like those of a protocol, for dry runs that download and read nothing.

        Data that are at hand are taken as they are.

        Raises:
            NormError: If the sizes of the data are not known.
        """

    @abstractmethod
    def start(self, spec: TrainingSpec, data: Any, network: nn.Module) -> TaskRun:
        """Begin the training of a network."""

    def examples(self, data: Any, part: PartName) -> Source:
        """The examples of a part as they are evaluated, from which statistics can be measured.

        Their batches have ``inputs``, with which a network in evaluation mode is called, and
        ``targets``.

        Args:
            data: Of the task.
            part: Which one.

        Raises:
            NormError: If they say nothing of the network's statistics.
        """
        return getattr(data, part)

    def files(self) -> tuple[Path, ...]:
        """The files that the options name and that there are: other contents are other runs."""
        return ()

    def prepare(self, spec: TrainingSpec, data: Any, on_step: Callable[[], object]) -> None:
        """Do what takes long and is due before a run's network can be built, such as a search.

        Args:
            spec: The run.
            data: Its data.
            on_step: Called after each step.
        """

    def num_prior_steps(self, spec: TrainingSpec, num_examples: int) -> int:
        """The steps that :meth:`prepare` takes at most, on so many training examples."""
        return 0

    def build(self, spec: TrainingSpec, data: Any) -> BuiltModel:
        """The network of a run, with its norm, before the first step.

        Raises:
            NormError: If it cannot be built.
        """
        return built(spec, data)

    def check(self, sweep: SweepSpec, data: Any) -> None:
        """Find bad input before the first run: a batch larger than the data, norms that do not fit.

        Raises:
            NormError: With what is wrong.
        """
        require_batches(sweep, data.name, data.num_examples)
        for norm in sweep.norms:
            for size in sweep.batch_sizes:
                spec = TrainingSpec(protocol=sweep.protocol, norm=norm, batch_size=size)
                self.build(spec, data)


@cache
def parse_task(text: str) -> Task:
    """Read a task as it is written on the command line.

    Args:
        text: A name, or a name and options as in ``adversarial:steps=4:epsilon=0.0157``.

    Raises:
        SpecError: If there is no such task, or an option is unknown, there twice or out of bounds.

    Example:
        >>> str(parse_task("classification"))
        'classification'
    """
    name, *pieces = text.split(":")
    if name not in TASKS:
        raise SpecError(f"there is no task {name!r}; known are {', '.join(TASKS)}")
    module, _, found = TASKS[name].partition(":")
    kind: type[Task] = getattr(import_module(module), found)
    values: dict[str, object] = {}
    for argument in _arguments(pieces):
        key, is_given, value = argument.partition("=")
        if not is_given or key in values or key not in kind.model_fields:
            known = ", ".join(f"{option}=..." for option in kind.model_fields)
            raise SpecError(
                f"task {text!r} has the argument {argument!r}; it takes {known or 'none'}"
                f"{', each once' if known else ''}"
            )
        values[key] = None if value == "none" else value
    return kind.checked(values, lambda option: f"{name}:{option}")


def _arguments(pieces: Iterable[str]) -> list[str]:
    """Arguments as they were before a colon in a value, as in ``target=my.py:make``, cut them."""
    found: list[str] = []
    for piece in pieces:
        if "=" in piece or not found:
            found.append(piece)
        else:
            found[-1] += f":{piece}"
    return found


def require_batches(sweep: SweepSpec, name: str, num_examples: int) -> None:
    """Refuse a batch that is larger than the data.

    Raises:
        SpecError: With the sizes.
    """
    largest = max(sweep.batch_sizes) * sweep.protocol.processes
    if largest > num_examples:
        raise SpecError(
            f"--batch-sizes was given {max(sweep.batch_sizes)}, but {name} has {num_examples} "
            f"training examples; give {num_examples} or less"
        )


def finite_scores(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores as records keep them: what is not finite becomes None."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def _written(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
