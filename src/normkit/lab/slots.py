"""Where a network has norms, and which maps come by."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit import NormSpec
from normkit.convert.rules import read
from normkit.convert.selection import find_norms
from normkit.errors import ConversionError, SpecError
from normkit.layers.base import TrackingLayer
from normkit.passes import call_with, copied, untouched
from normkit.text import listed

Call = tuple[nn.Module, Any]
"""A model, and what it is called with."""

PROBE_SIZE = 2  # examples that are sent through a model to see its maps
OF_A_FORWARD = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a model's own code raises on inputs that are not for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedNorm:
    """One norm of a network: where it stands, what it sees, and what it resolved to."""

    name: str
    norm: str
    num_features: int
    num_positions: int


@dataclass(slots=True)
class Slot:
    """The place of a norm, and the maps that come by.

    Args:
        num_features: Channels.
        channels_last: Whether they are the maps' last axis.
        num_positions: Greatest common divisor of the maps' numbers of positions; 0 for no maps.
        shapes: Shapes of the maps, channels second.
    """

    num_features: int
    channels_last: bool = False
    num_positions: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    @classmethod
    def of(cls, norm: nn.Module) -> "Slot":
        """The slot of a norm, before any map; one without a rule is refused when it is replaced."""
        try:
            source = read(norm)
        except ConversionError:
            return cls(getattr(norm, "num_features", 0))
        return cls(source.num_features, source.channels_last)

    def note(self, _norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Take the shape of a map, before the norm's forward."""
        size, *rest = inputs[0].shape
        if self.channels_last:
            rest = [rest[-1], *rest[:-1]]
        # a shared norm may see maps of several sizes: its groups must fit all of them
        self.num_positions = math.gcd(self.num_positions, math.prod(rest[1:]))
        self.shapes.add((size, *rest))

    def resolved(self, spec: NormSpec, batch_size: int | None) -> NormSpec:
        """What a spec means here."""
        return spec.resolve(
            self.num_features, batch_size=batch_size, num_positions=self.num_positions or None
        )

    def try_out(self, spec: NormSpec, batch_size: int, num_examples: int, training: bool) -> None:
        """Build a norm without storage and send maps without storage through it.

        Raises:
            NormError: If it does not fit.
        """
        with torch.device("meta"):
            layer = self.resolved(spec, batch_size).build(self.num_features)
            for size, *rest in self.shapes:  # a model may fold other axes into the examples
                layer.train(training)(torch.empty(size * num_examples // PROBE_SIZE, *rest))


def find_slots(model: nn.Module, example_input: Any, name: str) -> Mapping[str, Slot]:
    """Find the norms of a model, and send an example through it, which leaves it as it was.

    Raises:
        SpecError: If the model does not take the example, or has no norm.
    """
    norms = {names[0]: norm for norm, names in find_norms(model).items()}
    slots = {at: Slot.of(norm) for at, norm in norms.items()}
    hooks = [norm.register_forward_pre_hook(slots[at].note) for at, norm in norms.items()]
    try:
        send(
            (model, example_input),
            f"model {name!r} cannot take {_described(example_input)}",
            "choose data with larger pictures or another model",
        )
    finally:
        for hook in hooks:
            hook.remove()
    require_norms(model, slots, name)
    return slots


def require_norms(model: nn.Module, norms: Collection[Any], name: str) -> None:
    """Refuse a model without norms.

    Args:
        model: The model.
        norms: Those that were found in it.
        name: How the message calls the model.

    Raises:
        SpecError: With what the model has instead.
    """
    if norms:
        return
    leaves = {type(m).__name__: None for m in model.modules() if not any(m.children())}
    raise SpecError(
        f"model {name!r} has no norm to replace, only {listed(leaves)}; norms that a forward calls "
        f"as functions are not seen: put a module such as nn.BatchNorm2d in their place, or choose "
        f"a model that has norms, such as resnet18"
    )


def send(call: Call, complaint: str, way_out: str) -> None:
    """Send an example through a model in evaluation mode, which leaves it as it was.

    Args:
        call: The model, and what it is called with.
        complaint: What is said if it fails; its own words follow.
        way_out: What is said after them.

    Raises:
        SpecError: If it fails.
    """
    model, example_input = call
    try:
        with untouched(model, training=False), torch.no_grad():
            call_with(model, copied(example_input))
    except OF_A_FORWARD as error:
        raise SpecError(f"{complaint} ({error}); {way_out}") from error


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm looks at the batch in training."""
    try:
        return read(norm).over_batch
    except ConversionError:  # what replaces it will say so
        return isinstance(norm, _BatchNorm | TrackingLayer)


def _described(example_input: Any) -> str:
    if isinstance(example_input, Tensor):
        return f"inputs of shape {tuple(example_input.shape[1:])}"
    return "the example input"
