"""What a model is to the lab: something that builds itself around a norm layer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from normkit.errors import SpecError

NormLayer = Callable[[int], nn.Module]  # takes the number of features


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a model takes and tells apart."""

    input_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int


class Architecture(Protocol):
    """A frozen set of options that builds a network."""

    def build(self, task: Task, norm_layer: NormLayer | None) -> nn.Module:
        """Build the network; ``None`` keeps the model's own norms."""
        ...


ARCHITECTURES: dict[str, type[Architecture]] = {}


def architecture(name: str) -> Callable[[type[Architecture]], type[Architecture]]:
    """Register an architecture under the name that model strings begin with."""

    def register(options: type[Architecture]) -> type[Architecture]:
        if name in ARCHITECTURES:
            raise SpecError(f"model {name!r} is already registered: {ARCHITECTURES[name]}")
        ARCHITECTURES[name] = options
        return options

    return register


def parse_options(options: type[Architecture], text: str, arguments: Sequence[str]) -> Architecture:
    """Read ``key=value`` arguments into an architecture's integer options.

    Args:
        options: The architecture.
        text: The whole model string, for messages.
        arguments: What stands between its colons after the name.

    Raises:
        SpecError: If a key is unknown or a value is not a positive whole number.
    """
    known = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    values = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in known or not value.isdecimal() or int(value) == 0:
            allowed = ", ".join(f"{name}=N" for name in known) or "no arguments"
            rule = " with N a whole number, 1 or more" if known else ""
            raise SpecError(
                f"model {text!r} has the argument {argument!r}; it takes {allowed}{rule}"
            )
        values[key] = int(value)
    return options(**values)
