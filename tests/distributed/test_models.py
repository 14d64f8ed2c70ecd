"""Models whose norms use the batches of all processes, against one process with all of them."""

import pytest
import torch
from torch.testing import assert_close

from distributed.models_worker import PARTS, loss, network, whole
from distributed.processes import results

pytestmark = pytest.mark.xdist_group("models")  # the processes are started once
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("models")
    return results("distributed.models_worker", 2, folder, "synchronised", "accumulated", "sharded")


def alone(model, sizes, seed):
    """Outputs, gradients and buffers of one process; torch's norms are still torch's."""
    y = model(whole(sizes, seed))
    loss(y).backward()
    gradients = {name: p.grad / 2 for name, p in model.named_parameters()}  # DDP's are the mean
    return {"y": y.detach()} | gradients | dict(model.named_buffers())


@pytest.mark.parametrize("job", ["synchronised", "sharded"])
@pytest.mark.parametrize("sizes", PARTS, ids=str)
def test_a_step_is_that_of_one_process_with_the_whole_batch(job, sizes, found):
    expected = alone(network(), sizes, PARTS[sizes])
    parts = [each[job][sizes] for each in found]
    assert_close(torch.cat([each["y"] for each in parts]), expected.pop("y"), **CLOSE)
    for each in parts:
        for name, value in expected.items():
            scale = max(1.0, float(value.abs().max()))
            assert_close(each[name] / scale, value / scale, **CLOSE, msg=f"{name} of {job}")


def test_accumulated_statistics_are_those_of_all_micro_batches_of_all_processes(found):
    """By two passes in float64 over what each layer saw."""
    model = network()
    seen = {1: [], 7: []}
    for index, several in seen.items():
        model[index].register_forward_pre_hook(lambda _, args, seen=several: seen.append(args[0]))
    for sizes, seed in PARTS.items():
        model(whole(sizes, seed))
    for each in found:
        values = torch.cat(seen[1]).transpose(0, 1).flatten(1)
        assert_close(each["accumulated"]["1.running_mean"], values.mean(1), **CLOSE)
        assert_close(each["accumulated"]["1.running_var"], values.var(1), **CLOSE)
        groups = torch.cat(seen[7]).unflatten(1, (2, 3)).transpose(0, 1).flatten(1)
        expected = 0.1 * groups.mean(1), 0.9 + 0.1 * groups.var(1)
        assert_close(each["accumulated"]["7.running_mean"], expected[0], **CLOSE)
        assert_close(each["accumulated"]["7.running_var"], expected[1], **CLOSE)
        assert each["accumulated"]["3.batch.num_batches_tracked"] == 1
