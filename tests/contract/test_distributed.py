"""Every layer in ``DistributedDataParallel`` on two processes that talk through gloo."""

import pytest
import torch
from torch.testing import assert_close

from cases import EVERY
from contract.ddp_worker import PROCESSES, batch_of
from distributed.processes import results

pytestmark = pytest.mark.xdist_group("ddp")  # the processes are started once


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """What each process found for each case."""
    folder = tmp_path_factory.mktemp("ddp")
    found = results("contract.ddp_worker", PROCESSES, folder, "trained")
    return [each["trained"] for each in found]


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
