"""What a task is: something that is run for each arm and seed of a preset."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.lab.data import Dataset
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Data, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetTask:
    """Something that is run for each arm and seed.

    Args:
        name: In records.
        settings: The kind of its settings.
        network: ``network(settings, arm, dataset, seed)`` builds the network that is trained.
        measure: ``measure(settings, arm, seed, place)`` gives what was measured, as plain values.
    """

    name: str
    settings: type[Data]
    network: Callable[[Any, str, Dataset, int], nn.Module]
    measure: Callable[[Any, str, int, Place], Values]
