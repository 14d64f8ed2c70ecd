"""What a preset is: runs of a task, claims about them, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from normkit.lab.figures import figure_file
from normkit.lab.reproduce.papers import Paper
from normkit.lab.reproduce.tasks.records import PresetSpec, Values
from normkit.lab.reproduce.tasks.settings import Data
from normkit.lab.reproduce.tasks.task import PresetTask
from normkit.lab.reproduce.verdict import Criterion, Verdict, judge

Scale = Literal["tiny", "small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

Arms = Mapping[str, Values]  # what was measured with one seed, by arm
Runs = Mapping[int, Arms]  # by seed


NOT_SAID = "not said"
IMAGENET = {
    "data": "imagenet",
    "num_train": "1281167",
    "num_test": "50000",
    "pictures": "224x224 colour",
    "held_out": "nothing",
}
CIFAR10 = {
    "data": "cifar10",
    "num_train": "50000",
    "num_test": "10000",
    "pictures": "32x32 colour",
    "held_out": NOT_SAID,
}
"""What papers say by naming these data sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence of a paper, and the number that decides it.

    Args:
        source: Figure and section.
        text: What the paper says.
        quantity: What is computed of each seed's runs, in words.
        criterion: What the claim says of it.
        value: Computes it.
    """

    source: str
    text: str
    quantity: str
    criterion: Criterion
    value: Callable[[Arms], float]

    def judged(self, runs: Runs) -> Verdict:
        """The verdict of all seeds."""
        return judge([float(self.value(arms)) for arms in runs.values()], self.criterion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A preset at one scale: the settings of its task, and how many seeds."""

    settings: Data
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A figure of a paper.

    Args:
        name: On the command line.
        rows: Other names for it there, such as ``H-F2``: authors and place.
        paper: Whose figure it is.
        figures: Which.
        title: What it shows.
        task: What is run.
        arms: ``arms(settings)``: what is compared.
        claims: About the runs.
        draw: ``draw(figure, runs)`` draws on a matplotlib figure.
        size: ``(width, height)`` of the figure in inches.
        scales: Its size at each scale.
        original: What the paper used: for each fact of the settings, and ``num_seeds``.
    """

    name: str
    rows: tuple[str, ...] = ()
    paper: Paper
    figures: str
    title: str
    task: PresetTask
    arms: Callable[[Any], Sequence[str]]
    claims: tuple[Claim, ...]
    draw: Callable[[Any, Runs], None]
    scales: Mapping[Scale, Size]
    original: Mapping[str, str] = field(default_factory=dict)
    size: tuple[float, float] = (10, 4)

    def at(self, scale: Scale) -> Size:
        """Its settings at a scale."""
        return self.scales[scale]

    def write_figure(self, runs: Runs, path: Path) -> None:
        """Draw its figure into a file whose name ends in .svg, .png or .pdf.

        Raises:
            DataError: If it cannot be written.
        """
        with figure_file(path, figsize=self.size, layout="constrained") as figure:
            self.draw(figure, runs)

    def specs(self, scale: Scale, device: str = "cpu") -> tuple[PresetSpec, ...]:
        """All runs, seed by seed, so that every arm has a first result early."""
        size = self.at(scale)
        settings = size.settings.model_dump(mode="json", exclude_defaults=True)
        return tuple(
            PresetSpec(task=self.task.name, settings=settings, arm=arm, seed=seed, device=device)
            for seed in range(1, size.num_seeds + 1)
            for arm in self.arms(size.settings)
        )

    def differences(self, scale: Scale) -> tuple[str, ...]:
        """How a scale differs from the paper, setting by setting."""
        size = self.at(scale)
        ours = size.settings.facts() | {"num_seeds": size.num_seeds}
        pairs = [(name, _said(ours[name]), theirs) for name, theirs in self.original.items()]
        return tuple(
            f"{name.replace('_', ' ')} {value} (paper: {theirs})"
            for name, value, theirs in pairs
            if value != theirs
        )


def by_seed(runs: Runs, arm: str, name: str) -> np.ndarray:
    """Something measured of an arm with every seed, ``(seeds, ...)``."""
    return np.array([arms[arm][name] for arms in runs.values()], dtype=float)


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
