"""The small scale of every table: each arm is built as it will be run, and sees one batch."""

import numpy as np
import pytest
import torch

from normkit.lab.data import sources
from normkit.lab.data.clips import clips
from normkit.lab.data.opening import forget_data
from normkit.lab.data.scenes import scenes
from normkit.lab.device import seeded
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.spec import TrainingSpec
from normkit.lab.task import parse_task

NUM_PICTURES = 4000  # in place of Fashion-MNIST, whose files are large and may be missing


def pictures():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 256, (NUM_PICTURES, 1, 28, 28))
    values[:, :, 0] = 0
    found = sources._pictures(values, np.arange(NUM_PICTURES) % 10)
    return sources.Source(found, found.keep(torch.arange(500)))


def forget():
    forget_data()
    scenes.cache_clear()
    clips.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def drawn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.READERS, "fashion-mnist", pictures)
        forget()
        yield
    forget()


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_arm_is_built_and_takes_a_batch(name):
    for part in tables()[name].parts("small"):
        protocol, sizes = part.sweep.protocol, part.sweep.batch_sizes
        task = parse_task(protocol.task)
        data = task.sample(protocol).data
        for norm in part.sweep.norms:
            for size in sorted({min(sizes), max(sizes)}, reverse=True):
                spec = TrainingSpec(protocol=protocol, norm=norm, batch_size=size, seed=1)
                network = task.build(spec, data).model
            with torch.no_grad(), seeded(1):
                run = task.start(spec, data, network)
                batch = run.examples.take(torch.arange(min(size, len(run.examples))))
                loss = run.loss(network.train(), batch).loss
            assert loss.isfinite(), (part.name, norm)
