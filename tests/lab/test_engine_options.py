"""Options that change how a step computes: each is trained with, and seen to do what it says."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

from normkit.lab.loop import Loop
from normkit.lab.spec import Protocol, TrainingSpec
from normkit.lab.train import run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Wide pictures that get brighter from left to right, more of them than a run takes."""
    folder = tmp_path_factory.mktemp("options") / "photos"
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for at in range(30):
            values = np.full((32, 48, 3), 4 * at, dtype=np.uint8)
            values[:, :, number] = ramp
            Image.fromarray(values).save(folder / name / f"{at}.png")
    return folder


@pytest.fixture
def steps(monkeypatch):
    """The loops of a run, and the batches of its steps."""
    seen, step = [], Loop.step

    def noted(loop, parts, **given):
        seen.append((loop, parts))
        return step(loop, parts, **given)

    monkeypatch.setattr(Loop, "step", noted)
    return seen


def losses_of(photos, norm="bn", **options):
    """Mean losses of the epochs of a short run."""
    given = {"data": f"folder:{photos}", "image_size": 16, "limit": 32, "epochs": 2, **options}
    spec = TrainingSpec(protocol=Protocol.checked(given), norm=norm, batch_size=8, seed=1)
    outcome = run(spec).outcome
    assert outcome.status == "finished", outcome.message
    assert outcome.num_steps == 8
    return [epoch.train_loss for epoch in outcome.epochs]


@pytest.mark.slow
def test_a_compiled_network_trains_as_a_plain_one(photos):
    torch._dynamo.reset()
    counters.clear()
    model = {"model": "mlp:depth=2:width=8"}
    plain = losses_of(photos, **model)
    assert counters["stats"]["unique_graphs"] == 0
    assert losses_of(photos, **model, compile=True) == pytest.approx(plain, rel=1e-3)
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_channels_last_is_the_format_of_maps_and_weights(photos, monkeypatch):
    formats, convolve = [], nn.Conv2d._conv_forward

    def noted(layer, x, weight, bias):
        layout = {"memory_format": torch.channels_last}
        formats.append((x.is_contiguous(**layout), weight.is_contiguous(**layout)))
        return convolve(layer, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", noted)
    model = {"model": "small-resnet:width=4:blocks=1"}
    plain = losses_of(photos, **model)
    assert {as_map for as_map, _ in formats} == {False}
    formats.clear()
    assert losses_of(photos, **model, channels_last=True) == pytest.approx(plain, rel=1e-3)
    trained = formats[7:]  # the first ones look for the norms' places
    assert sum(as_map and as_weight for as_map, as_weight in trained) > 0.9 * len(trained)


def test_drop_path_leaves_branches_out(photos, steps):
    model = {"model": "timm:test_resnet", "image_size": 32}
    plain = losses_of(photos, **model)
    assert losses_of(photos, **model, drop_path=0.0) == plain
    assert losses_of(photos, **model, drop_path=0.9) != plain
    network, part = steps[-1][0].network, steps[-1][1][0]
    once, again = network.train()(part.inputs), network(part.inputs)
    assert not torch.equal(once, again)
    assert torch.equal(network.eval()(part.inputs), network(part.inputs))


def test_imagenets_augmentation_crops_and_resizes(photos, steps):
    model = {"model": "small-resnet:width=4:blocks=1"}
    plain = losses_of(photos, **model)
    whole = spreads(steps)
    steps.clear()
    augmented = losses_of(photos, **model, augment=("imagenet",))
    assert augmented != plain
    assert losses_of(photos, **model, augment=("imagenet",)) == augmented
    assert {part.inputs.shape for _, (part,) in steps} == {(8, 3, 16, 16)}
    cut = spreads(steps)
    assert cut.min() < 0.5 * whole.min()  # a part of the ramp is stretched over the picture
    assert cut.std() > 5 * whole.std()


def spreads(steps):
    """Differences between the brightest and the darkest column of each picture that was seen."""
    pictures = torch.cat([part.inputs for _, (part,) in steps])
    columns = pictures.mean(2)
    return (columns.amax(2) - columns.amin(2)).amax(1)
