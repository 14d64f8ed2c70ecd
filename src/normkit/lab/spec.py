"""What decides a run and a sweep, as values that print, parse and hash."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from normkit.errors import SpecError
from normkit.lab.arms import Arm
from normkit.lab.data.known import data_text
from normkit.lab.frozen import Count, Frozen, Seed, Threads
from normkit.lab.own_norms import reference_in
from normkit.lab.recipe import PositiveRate, Recipe
from normkit.lab.user_code import absolute
from normkit.recipes import METHODS

CLASSIFICATION = "classification"
T = TypeVar("T")
Strategy = Literal["auto", "ddp", "fsdp"]


class Protocol(Recipe):
    """Everything that the runs of one sweep share: the recipe, and what it trains on what."""

    data: str = Field(
        default="digits",
        description="the name of a data set, ./PATH or folder:PATH, or FILE.py:FUNCTION",
    )
    limit: Count | None = Field(
        default=None, description="the number of training examples to keep, 1 or more"
    )
    image_size: Count | None = Field(
        default=None, description="the height and width of the network's input, or none"
    )
    hold_out: bool = Field(
        default=True, description="yes, or no: validation examples are trained on as well"
    )
    model: str = Field(default="small-resnet", description="the name of a model, or FILE.py:NAME")
    own_norms: tuple[str, ...] = Field(
        default=(), description="NAME=FILE.py:CLASS, or several with commas between"
    )
    weights: str | None = Field(
        default=None, description="a .safetensors file that every run starts from, or none"
    )
    train: str | None = Field(
        default=None, description="FILE.py:FUNCTION that trains in place of all this, or none"
    )
    task: str = Field(
        default=CLASSIFICATION,
        description="the name of a task, with options as in adversarial:steps=4",
    )
    better: Literal["higher", "lower"] = Field(
        default="higher", description="higher or lower: which scores of --train are better"
    )
    device: str = Field(default="cpu", description="a torch device such as cpu or cuda")
    threads: Threads = Field(default=1, description="CPU threads of one run, 1 or more")
    strategy: Strategy = Field(default="auto", description="auto, ddp or fsdp")
    processes: Count = Field(default=1, description="processes that train together, 1 or more")
    synchronize_statistics: bool = Field(default=False, description="yes or no")

    @field_validator("model", "train")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """The same file, however it was written and from wherever."""
        return None if value is None else absolute(value)

    @field_validator("own_norms")
    @classmethod
    def _with_absolute_paths(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        references = [reference_in(value) for value in values]
        return tuple(
            f"{value.removesuffix(reference)}{absolute(reference)}"
            for value, reference in zip(values, references, strict=True)
        )

    @field_validator("data")
    @classmethod
    def _named(cls, value: str) -> str:
        return data_text(value)

    @field_validator("weights")
    @classmethod
    def _absolute_path(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().resolve())

    @property
    def title(self) -> str:
        """What is trained on what, in few words."""
        if self.train is not None:
            return f"{self.train.rpartition('/')[2]}"
        model, data = (text.rpartition("/")[2] for text in (self.model, self.data))
        about = "" if self.task == CLASSIFICATION else f"{self.task}, "
        return f"{about}{model} on {data}"

    def step_examples(self, batch_size: int) -> int:
        """Examples of a step of the optimizer, over all processes."""
        return batch_size * self.accumulate * self.processes


class RunSpec(Frozen):
    """Everything that decides a run; equal specs on one machine give equal outcomes."""

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return False

    @property
    def num_threads(self) -> int:
        """CPU threads of the run."""
        return 1

    @property
    def own_names(self) -> tuple[str, ...]:
        """What it names that may be known to this process only."""
        return ()

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that differ wherever the spec differs."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class TrainingSpec(RunSpec):
    """One network trained with one norm, batch size and seed."""

    protocol: Protocol = Protocol()
    norm: str = Field(description="a norm such as bn or gn:8, or an arm such as xbn/gn:64")
    batch_size: Count = Field(description="the examples of a training step, 1 or more")
    seed: Seed = Field(default=0, description="the seed of weights and data order, 0 or more")

    @field_validator("norm")
    @classmethod
    def _canonical(cls, value: str, about: ValidationInfo) -> str:
        """The arm's usual text; a record may have a norm of a file that is not imported here."""
        own = {text.partition("=")[0] for text in about.data["protocol"].own_norms}
        is_own = not own.isdisjoint(re.split("[/:+]", value))
        return value if is_own and own.isdisjoint(METHODS) else str(Arm.parse(value))

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.protocol.device.startswith("cuda")

    @property
    def num_threads(self) -> int:
        """CPU threads of the run."""
        return self.protocol.threads

    @property
    def own_names(self) -> tuple[str, ...]:
        """Functions and data that Python may have given."""
        protocol = self.protocol
        norms = [reference_in(text) for text in protocol.own_norms]
        return (protocol.model, protocol.data, protocol.train or "", *norms)

    @property
    def file_name(self) -> str:
        """A name for files of this run: ``gn_8-b2-s1-`` and its key."""
        norm = "".join(c if c.isalnum() or c in "-+" else "_" for c in self.norm)
        return f"{norm}-b{self.batch_size}-s{self.seed}-{self.key}"

    @property
    def has_learning_rate_as_update_rate(self) -> bool:
        """Whether estimates of micro-batches move by the learning rate, as in the paper."""
        return Arm.parse(self.norm).has_learning_rate_as_update_rate


class SweepSpec(Frozen):
    """One network trained with several norms at several batch sizes."""

    protocol: Protocol = Protocol()
    norms: tuple[str, ...] = Field(min_length=1, description="one norm or more")
    batch_sizes: tuple[Count, ...] = Field(
        min_length=1, description="one batch size or more, each 1 or more"
    )
    seeds: tuple[Seed, ...] = Field(min_length=1, description="one seed or more, each 0 or more")
    learning_rates: tuple[PositiveRate, ...] = Field(
        default=(), description="rates above 0, of which each cell takes its best, or none"
    )
    tune_seeds: Count | None = Field(
        default=None, description="the first seeds, on which rates are chosen: 1 or more, or none"
    )

    @field_validator("norms")
    @classmethod
    def _canonical(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct("norms", [str(Arm.parse(value)) for value in values])

    @field_validator("batch_sizes", "seeds", "learning_rates")
    @classmethod
    def _distinct_numbers(cls, values: tuple[T, ...], about: ValidationInfo) -> tuple[T, ...]:
        return _distinct(str(about.field_name).replace("_", " "), values)

    @property
    def seeds_of_choice(self) -> tuple[int, ...]:
        """The seeds that all learning rates run with: the first ``tune_seeds``, by default all."""
        return self.seeds[: self.tune_seeds]

    @property
    def runs_of_a_cell(self) -> int:
        """How many runs one norm at one batch size has."""
        tried = len(self.seeds_of_choice)
        return tried * max(1, len(self.learning_rates)) + len(self.seeds) - tried

    def runs(self) -> tuple[TrainingSpec, ...]:
        """Every run that there may be, seed by seed, so that every cell has a first result early.

        With ``tune_seeds``, the later seeds run with the rate that is chosen only.
        """
        rates = self.learning_rates or (self.protocol.base_lr,)
        protocols = [self.protocol.model_copy(update={"base_lr": rate}) for rate in rates]
        return tuple(
            TrainingSpec(protocol=protocol, norm=norm, batch_size=batch_size, seed=seed)
            for seed, batch_size, norm, protocol in itertools.product(
                self.seeds, self.batch_sizes, self.norms, protocols
            )
        )


def _distinct(name: str, values: Sequence[T]) -> tuple[T, ...]:
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        raise SpecError(f"{name} name {', '.join(repeated)} more than once; name each one once")
    return tuple(values)
