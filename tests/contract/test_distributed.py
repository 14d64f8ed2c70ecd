"""Every layer in ``DistributedDataParallel`` on two processes that talk through gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from cases import EVERY
from contract.ddp_worker import PROCESSES, batch_of

pytestmark = pytest.mark.xdist_group("ddp")  # the processes are started once
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """What each process found for each case."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "contract.ddp_worker", str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_gradients_are_the_mean_over_processes(case, broadcast, gradients):
    alone = []
    for rank in range(PROCESSES):
        layer = case.make(dtype=torch.float64)
        (layer(batch_of(rank)).pow(3).sum() + layer(batch_of(rank) + 1).sum()).backward()
        alone.append({name: p.grad for name, p in layer.named_parameters()})
    for name in alone[0]:
        mean = (alone[0][name] + alone[1][name]) / 2
        for rank in range(PROCESSES):
            assert_close(gradients[rank][case.name, broadcast][name], mean)
