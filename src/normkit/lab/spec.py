"""What decides a run and a sweep, as values that print, parse and hash."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from normkit import NormSpec
from normkit.errors import SpecError
from normkit.text import shortened

REFERENCE_BATCH_SIZE = 128  # the batch size that `base_lr` is stated for

T = TypeVar("T")
Count = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
Threads = Annotated[int, Field(ge=1, le=1024, strict=True)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]  # what torch's generators take


class Frozen(BaseModel):
    """A value that cannot change and refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def checked(cls, values: Mapping[str, object], spelled: Callable[[str], str] = str) -> Self:
        """Build the value, or say in one message everything that is wrong, once for each field.

        Args:
            values: Field names and what they were given.
            spelled: How messages write a field's name, such as ``--batch-sizes``.

        Raises:
            SpecError: If a value breaks its field's rule or a field is unknown.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = {e["loc"][:1]: e for e in reversed(error.errors())}  # the first one wins
            complaints = [cls._complaint(e, spelled) for e in reversed(first.values())]
            raise SpecError("; ".join(complaints)) from error

    @classmethod
    def _complaint(cls, error: ErrorDetails, spelled: Callable[[str], str]) -> str:
        context = error.get("ctx", {})
        if isinstance(context.get("error"), SpecError):
            return str(context["error"])
        name = str(error["loc"][0])
        if name not in cls.model_fields:
            return f"{name!r} is no field; known are {', '.join(cls.model_fields)}"
        rule = error["msg"][0].lower() + error["msg"][1:]
        way_out = cls.model_fields[name].description
        given = shortened(repr(error["input"]), 100)
        return f"{spelled(name)} was given {given}: {rule}; give {way_out}"


class Protocol(Frozen):
    """Everything that the runs of one sweep share.

    The optimizer is SGD; weights, biases and the norms' own parameters all decay alike.
    """

    data: str = Field(default="digits", description="the name of a data set")
    limit: Count | None = Field(
        default=None, description="the number of training examples to keep, 1 or more"
    )
    model: str = Field(default="small-resnet", description="the name of a model")
    epochs: Count = Field(default=4, description="passes over the training data, 1 or more")
    base_lr: float = Field(
        default=0.1, gt=0, description=f"the learning rate at batch size {REFERENCE_BATCH_SIZE}"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="SGD's momentum, in [0, 1)")
    weight_decay: float = Field(default=1e-4, ge=0, description="SGD's weight decay, 0 or more")
    lr_drops: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(81 / 164, 122 / 164),
        description="the shares of the epochs after which the rate drops",
    )
    lr_factor: float = Field(
        default=0.1, gt=0, le=1, description="what the learning rate is multiplied by at a drop"
    )
    device: str = Field(default="cpu", description="a torch device such as cpu or cuda")
    threads: Threads = Field(default=1, description="CPU threads of one run, 1 or more")


class RunSpec(Frozen):
    """Everything that decides a run; equal specs on one machine give equal outcomes."""

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that differ wherever the spec differs."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class TrainingSpec(RunSpec):
    """One network trained with one norm, batch size and seed."""

    protocol: Protocol = Protocol()
    norm: str = Field(description="a norm such as bn, gn:8 or bgn:auto")
    batch_size: Count = Field(description="the examples of a training step, 1 or more")
    seed: Seed = Field(default=0, description="the seed of weights and data order, 0 or more")

    @field_validator("norm")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return str(NormSpec.parse(value))

    @property
    def has_learning_rate_as_update_rate(self) -> bool:
        """Whether estimates of micro-batches move by the learning rate, as in the paper."""
        options = dict(NormSpec.parse(self.norm).arguments)
        return bool(options.get("micro_batch")) and "update_rate" not in options

    def learning_rate(self, epoch: int) -> float:
        r"""Learning rate of an epoch.

        .. math::  \text{base\_lr} \cdot \text{batch} / 128 \cdot \text{factor}^{\text{drops}}

        Args:
            epoch: Epochs finished before this one.

        Source:
            Gunawan et al., appendix B.1: ``0.1 * batch / 128``, a tenth after 81 and after 122 of
            164 epochs.
        """
        share = epoch / self.protocol.epochs
        num_drops = sum(share >= drop for drop in self.protocol.lr_drops)
        scaled = self.protocol.base_lr * self.batch_size / REFERENCE_BATCH_SIZE
        return scaled * self.protocol.lr_factor**num_drops


class SweepSpec(Frozen):
    """One network trained with several norms at several batch sizes."""

    protocol: Protocol = Protocol()
    norms: tuple[str, ...] = Field(min_length=1, description="one norm or more")
    batch_sizes: tuple[Count, ...] = Field(
        min_length=1, description="one batch size or more, each 1 or more"
    )
    seeds: tuple[Seed, ...] = Field(min_length=1, description="one seed or more, each 0 or more")

    @field_validator("norms")
    @classmethod
    def _canonical(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct("norms", [str(NormSpec.parse(value)) for value in values])

    @field_validator("batch_sizes", "seeds")
    @classmethod
    def _distinct_numbers(cls, values: tuple[int, ...], about: ValidationInfo) -> tuple[int, ...]:
        return _distinct(str(about.field_name).replace("_", " "), values)

    def runs(self) -> tuple[TrainingSpec, ...]:
        """All runs, seed by seed, so that every cell has a first result early."""
        return tuple(
            TrainingSpec(protocol=self.protocol, norm=norm, batch_size=batch_size, seed=seed)
            for seed, batch_size, norm in itertools.product(
                self.seeds, self.batch_sizes, self.norms
            )
        )


def _distinct(name: str, values: Sequence[T]) -> tuple[T, ...]:
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        raise SpecError(f"{name} name {', '.join(repeated)} more than once; name each one once")
    return tuple(values)
