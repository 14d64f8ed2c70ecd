"""Batches of pictures, maps and clips that processes of their own read ahead."""

import os
from dataclasses import astuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from normkit.lab.loading import Loading, loaded_batches, read_ahead
from normkit.lab.spec import Protocol
from normkit.lab.task import parse_task

SCENES = "scenes:items=digits:side=32:most=2:smallest=40:largest=70:test=6"
DATA = {
    "detection": (SCENES, ()),
    "segmentation": (SCENES, ("crop", "flip")),
    "video": ("clips:items=digits:side=20:test=6", ("crop",)),
}


def values(batches):
    return [leaf for batch in batches for leaf in tree_leaves(astuple(batch))]


@pytest.mark.parametrize("name", DATA)
def test_batches_are_the_same_however_many_processes_read_them(name):
    text, augment = DATA[name]
    task = parse_task(name)
    examples = task.examples(task.data(Protocol(data=text, task=name)), "train")
    parts = torch.arange(7).split(2)
    before = torch.get_rng_state()
    alone, ahead = (
        values(loaded_batches(examples, parts, Loading(augment, 3, number))) for number in (0, 2)
    )
    assert len(alone) == len(ahead) > 7
    assert all(torch.equal(one, other) for one, other in zip(alone, ahead, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def own_process(part):
    return torch.tensor([os.getpid(), *part.tolist()])


def test_other_processes_make_the_batches_in_order():
    found = [batch.tolist() for batch in read_ahead(own_process, torch.arange(6).split(2), 2)]
    assert [batch[1:] for batch in found] == [[0, 1], [2, 3], [4, 5]]
    assert os.getpid() not in {batch[0] for batch in found}
    assert {batch[0].item() for batch in read_ahead(own_process, [torch.arange(2)], 0)} == {
        os.getpid()
    }
