"""What a backbone has learned before: by the engine's steps, the same as by torch's own."""

import pytest
import torch
from torch.nn import functional

from normkit.lab.data.scenes import scenes, single_items
from normkit.lab.device import seeded
from normkit.lab.models.detectors import scaled
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.tasks import starting

NUM_ITEMS, NUM_EPOCHS = 80, 2  # two batches and a rest, which is left out


def by_torch(spec, data):
    """SGD on a cosine, step by step."""
    pictures, classes = single_items(data.name, NUM_ITEMS)
    with seeded(spec.seed):
        model = starting.classifier(spec, data, spec.norm).model
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_EPOCHS * 2)
    orders = torch.Generator().manual_seed(spec.seed)
    for _ in range(NUM_EPOCHS):
        order = torch.randperm(NUM_ITEMS, generator=orders)
        for part in order[:64].split(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(scaled(pictures[part])), classes[part]).backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()


@pytest.mark.parametrize("norm", ["bn", "gn:4"])
def test_a_backbone_learns_on_single_objects_as_by_torchs_own_loop(monkeypatch, norm):
    monkeypatch.setattr(starting, "NUM_ITEMS", NUM_ITEMS)
    data = scenes("scenes:side=48")
    protocol = Protocol(model="small-resnet:width=4", data="scenes:side=48")
    spec = TrainingSpec(protocol=protocol, norm=norm, batch_size=4, seed=3)
    before = torch.get_rng_state()
    found = starting.learned_on_items(spec, data, NUM_EPOCHS)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in by_torch(spec, data).items():
        assert torch.equal(found[name], value), name
