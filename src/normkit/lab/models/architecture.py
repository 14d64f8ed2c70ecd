"""Architectures: named sets of options that build a network for an input and its classes."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn

from normkit.errors import SpecError
from normkit.lab.data.files import MAX_CLASSES
from normkit.lab.environment import memory_bytes
from normkit.lab.user_code import is_reference
from normkit.recipes import require_size

MAX_CHANNELS, MAX_INPUT = 4096, 2**24  # channels and values of one input
MAX_OPTION, MAX_NAME = 2048, 400  # largest value of an option; characters of a model's name


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The shape of an input, and the number of classes.

    Raises:
        OptionError: If a number is not an integer of at least 1.
        SpecError: If a number is too large.
    """

    input_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int

    def __post_init__(self) -> None:
        require_size("num_classes", self.num_classes, at_most=MAX_CLASSES)
        sizes = [require_size("input_shape", size, at_most=MAX_INPUT) for size in self.input_shape]
        if len(sizes) != 3 or sizes[0] > MAX_CHANNELS or math.prod(sizes) > MAX_INPUT:
            raise SpecError(
                f"an input of shape {self.input_shape} was given; it has channels, height and "
                f"width, at most {MAX_CHANNELS} channels and {MAX_INPUT} values"
            )


class Architecture(Protocol):
    """A frozen set of options that builds a network with its own norms."""

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        ...


ARCHITECTURES: dict[str, type[Architecture]] = {}
A = TypeVar("A", bound=type[Architecture])


def architecture(name: str) -> Callable[[A], A]:
    """Register an architecture under the name that model strings begin with."""

    def register(options: A) -> A:
        if name in ARCHITECTURES:
            raise SpecError(f"model {name!r} is already registered: {ARCHITECTURES[name]}")
        ARCHITECTURES[name] = options
        return options

    return register


def parse_options(options: type[Architecture], text: str, arguments: Sequence[str]) -> Architecture:
    """Read ``key=value`` arguments into an architecture's integer options.

    Args:
        options: The architecture.
        text: The whole model string, for error messages.
        arguments: The arguments after the name, which colons separate.

    Raises:
        SpecError: If a key is unknown or repeated, or a value is not an integer in the bounds.
    """
    known = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    values = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        number = int(value) if re.fullmatch("[0-9]{1,9}", value) else 0
        if key not in known or key in values or not 1 <= number <= MAX_OPTION:
            allowed = ", ".join(f"{name}=N" for name in known) or "no arguments"
            rule = f", each once, with N a whole number from 1 to {MAX_OPTION}" if known else ""
            raise SpecError(
                f"model {text!r} has the argument {argument!r}; it takes {allowed}{rule}"
            )
        values[key] = number
    return options(**values)


def require_room(architecture: Architecture, text: str, shapes: Shapes) -> None:
    """Refuse a network whose weights would fill more than a quarter of this machine's memory.

    Training needs three times as much for gradients and the optimizer. To count the weights, the
    network is built on the meta device.

    Raises:
        SpecError: If the network is too large.
    """
    if is_reference(text):
        return  # a user's function must be called only once
    try:
        with torch.device("meta"):
            model = architecture.build(shapes)
    except (RuntimeError, NotImplementedError):
        return  # some of timm's networks read values of tensors while they are built
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = memory_bytes()
    if 4 * needed > memory:
        raise SpecError(
            f"model {text!r} would have {needed / 2**30:.3g} GiB of weights for inputs of shape "
            f"{shapes.input_shape} and {shapes.num_classes} classes, over a quarter of this "
            f"machine's {memory / 2**30:.3g} GiB; make it narrower or less deep"
        )
