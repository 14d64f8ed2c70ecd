"""What a conversion rule reads from a norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from normkit.core.ranks import ProcessGroup
from normkit.spec import Value


class Statistics(NamedTuple):
    """Running mean and variance of each channel, and the number of batches if it is counted."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None


class Activation(NamedTuple):
    """The dropout and activation that a layer applies to its normalised output."""

    drop: nn.Module
    act: nn.Module

    def described(self) -> Iterator[str]:
        """Yield the names of those that are not identities."""
        for what, module in (("drop", self.drop), ("activation", self.act)):
            if not isinstance(module, nn.Identity):
                yield f"{what} {type(module).__name__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A norm of any library, as its conversion rule reads it.

    Args:
        num_features: Channels.
        options: Options that a new layer may take over, under normkit's names.
        weight: Scale of each channel, ``(C,)``: a parameter, or a tensor of fixed values.
        bias: Shift of each channel, ``(C,)``: a parameter, or a tensor of fixed values.
        statistics: Running statistics, if a new layer can continue them.
        over_batch: Whether the layer's statistics are taken over the batch in training.
        buffers_are_frozen: Whether evaluation uses running statistics that training does not
            update, because ``track_running_stats`` was set to False while the buffers existed.
        equivalent_spec: Spec, without options, of the normkit layer that computes the same; empty
            if there is none.
        activation: Dropout and activation that the layer applies after normalising.
        channels_last: Whether the channels are the last axis of the input.
        fixed: Whether training changes neither the parameters nor the statistics.
        lost: What no new layer takes over, in words.
        warnings: What the user should know, in words.
        without_positions: Whether inputs of shape ``(N, C)`` are common for this layer.
        process_group: The processes over whose batches statistics are taken in training.
    """

    num_features: int
    options: Mapping[str, Value] = field(default_factory=dict)
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: Statistics | None = None
    over_batch: bool = False
    buffers_are_frozen: bool = False
    equivalent_spec: str = ""
    activation: Activation | None = None
    channels_last: bool = False
    fixed: bool = False
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    without_positions: bool = False
    process_group: ProcessGroup = None

    @property
    def values(self) -> tuple[object, ...]:
        """The tensors and modules of the layer that this object refers to."""
        held = (self.weight, self.bias, *(self.statistics or ()), *(self.activation or ()))
        return tuple(value for value in held if value is not None)

    @property
    def has_mode(self) -> bool:
        """Whether the layer behaves differently in training and in evaluation."""
        return not self.fixed and (self.over_batch or self.statistics is not None)
