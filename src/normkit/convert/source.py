"""What a norm has that another one can take over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from normkit.core.ranks import ProcessGroup
from normkit.spec import Value


class Statistics(NamedTuple):
    """Running statistics of a layer's input, one value a channel; the count where there is one."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None


class Activation(NamedTuple):
    """What a layer does with its result before it gives it away."""

    drop: nn.Module
    act: nn.Module

    def described(self) -> Iterator[str]:
        """Names of those that do something."""
        for what, module in (("drop", self.drop), ("activation", self.act)):
            if not isinstance(module, nn.Identity):
                yield f"{what} {type(module).__name__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A norm of any library as its rule reads it.

    Args:
        num_features: Channels.
        options: Options that a layer of ours may take over, by our names.
        weight: Scale of each channel, ``(C,)``: a parameter, or fixed values.
        bias: Shift of each channel, likewise.
        statistics: Running statistics, if another layer can continue them.
        over_batch: Whether its statistics are taken over the batch in training.
        still: Whether evaluation goes by its running statistics, which training does not move:
            ``track_running_stats`` was switched off when they were there.
        twin: Spec of the layer of ours that computes the same, without options; "" is none.
        activation: What comes after the norm inside the layer.
        channels_last: Whether channels are its input's last axis.
        fixed: Whether weights and statistics do not follow the training.
        lost: What no other norm takes over, in words.
        warnings: What the user must know, in words.
        without_positions: Whether inputs ``(N, C)`` are usual.
        process_group: Whose batches count as one batch in training.
    """

    num_features: int
    options: Mapping[str, Value] = field(default_factory=dict)
    weight: Tensor | None = None
    bias: Tensor | None = None
    statistics: Statistics | None = None
    over_batch: bool = False
    still: bool = False
    twin: str = ""
    activation: Activation | None = None
    channels_last: bool = False
    fixed: bool = False
    lost: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    without_positions: bool = False
    process_group: ProcessGroup = None

    @property
    def values(self) -> tuple[object, ...]:
        """Everything in it that the layer holds."""
        held = (self.weight, self.bias, *(self.statistics or ()), *(self.activation or ()))
        return tuple(value for value in held if value is not None)

    @property
    def has_mode(self) -> bool:
        """Whether training and evaluation differ, so that the layer's own mode means something."""
        return not self.fixed and (self.over_batch or self.statistics is not None)
