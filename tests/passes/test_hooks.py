"""Copies and pickles of a model that are made inside of a tool's block."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()
from timm.layers import BatchNormAct2d  # noqa: E402 - torchvision's operators come first


@contextmanager
def frozen(model):
    nk.freeze_statistics(model)
    yield
    nk.thaw_statistics(model)


@contextmanager
def guarded(model):
    guard = nk.guard_statistics_(model)
    yield
    guard.remove()


BLOCKS = {
    "add_output_noise": nk.add_output_noise,
    "disturb_statistics": lambda model: nk.disturb_statistics(model, 0.5),
    "Probe": lambda model: nk.Probe(model, every=1),
    "accumulate_statistics": lambda model: nk.accumulate_statistics(model, 2),
    "freeze_statistics": frozen,
    "guard_statistics_": guarded,
}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def net():
    torch.manual_seed(0)
    layers = (nn.BatchNorm2d(4), BatchNormAct2d(4), nk.BatchChannelNorm(4, num_groups=2))
    return nn.Sequential(nn.Conv2d(3, 4, 3), *layers)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_can_be_copied_inside(block, copied):
    model, x = net(), torch.randn(4, 3, 6, 6)
    with BLOCKS[block](model):
        model(x)
        other = copied(model)
        twin = copied(model)
        assert torch.equal(other(x), twin(x))  # no noise, and nothing that one has of the other
    model(x)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), twin.buffers(), strict=True))
    moved = {name for name, b in other.named_buffers() if name.endswith("batches_tracked") and b}
    still = block == "freeze_statistics"
    assert len(moved) == (0 if still else 3)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_made_in_a_block_of_temporary_hooks_are_free_of_it(copied):
    model, x = net(), torch.randn(4, 3, 6, 6)
    plain = net()
    plain(x)
    for block in ("add_output_noise", "Probe", "accumulate_statistics"):
        with BLOCKS[block](model):
            other = copied(model)
        other(x)
        for a, b in zip(other.buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b), block
