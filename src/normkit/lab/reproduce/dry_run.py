"""What a figure's preset would take: every arm built as the scale says, and a step of each."""

from __future__ import annotations

from typing import Any

from normkit.lab.data import Dataset
from normkit.lab.data.known import KNOWN, random_dataset
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.dry_run import Estimate, measure_steps
from normkit.lab.reproduce.preset import Preset, Scale
from normkit.lab.reproduce.tables.dry_run import MOST_EXAMPLES, PartEstimate
from normkit.lab.reproduce.tasks.settings import Data
from normkit.lab.spec import Protocol
from normkit.lab.tasks.classification import ClassificationRun

SEED = 1


def estimate_preset(preset: Preset, scale: Scale, device: str = "cpu") -> PartEstimate:
    """Build every arm of a preset at a scale, and take a step of each; analyses come on top.

    Raises:
        NormError: If an arm cannot be built.
    """
    size = preset.at(scale)
    settings: Any = size.settings
    data, missing = _data(settings)
    protocol = Protocol(data=settings.data, device=device, **settings.recipe.model_dump())
    cells = []
    for arm in preset.arms(settings):
        with threads_of(protocol.threads), seeded(SEED, parse_device(device)):
            network = preset.task.network(settings, arm, data, SEED)
            run = ClassificationRun(network, protocol, data)
            batch_size = settings.step_size(arm)
            steps = measure_steps(run, protocol, batch_size, MOST_EXAMPLES)
        num_runs = size.num_seeds * settings.num_networks
        cells.append(
            Estimate(norm=arm, batch_size=batch_size, num_runs=num_runs, **steps._asdict())
        )
    return PartEstimate(part="", data=settings.data, missing=missing, cells=tuple(cells))


def _data(settings: Data) -> tuple[Dataset[Any], str | None]:
    """Random pictures for a data set of the papers; others as they are."""
    name = settings.data
    if name not in KNOWN:
        return settings.load_data(), None
    found = random_dataset(name, settings.num_train, settings.hold_out)
    return found, KNOWN[name].missing()
