"""Networks before their first step: pretrained weights, and what an arm makes of them."""

import pytest
import torch
from safetensors.torch import load_file

from normkit.lab import Recipe, compare, start
from normkit.lab.checkpoints import restored
from normkit.lab.data import load, open_data
from normkit.lab.models import apply_arm, build_model
from normkit.lab.spec import Protocol, TrainingSpec

CALIBRATED = [
    "gn:8", "xbn/gn:8", "gnbn/gn:4", "gn:8+ws", "bn+ws", "gn:8+ws:center", "gn:8+wn", "gn:8+cwn",
    "xbn/gn:8+ws:scale",
]  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Weights of a network with batch norm."""
    out = tmp_path_factory.mktemp("learned")
    compare(
        "small-resnet:width=8", norms="bn", batch_sizes=8, seeds=1, recipe=Recipe(epochs=5),
        save_weights=True, out=out,
    )  # fmt: skip
    (path,) = (out / "weights").iterdir()
    return path


def started(path, norm):
    """A network as its run begins, and its accuracy."""
    protocol = Protocol(model="small-resnet:width=8", weights=str(path))
    spec = TrainingSpec(protocol=protocol, norm=norm, batch_size=8, seed=1)
    built = start.built(spec, open_data("digits"))
    return built, accuracy_of(built.model)


def accuracy_of(model):
    data = load("digits").test
    with torch.no_grad():
        right = model.eval()(data.inputs).argmax(1) == data.targets
    return right.double().mean().item()


@pytest.mark.parametrize("arm", CALIBRATED)
def test_arms_start_calibrated_from_pretrained_weights(learned, arm):
    found, accuracy = started(learned, arm)
    plain = build_model("small-resnet:width=8", num_classes=10, input_shape=(1, 8, 8)).model
    model = apply_arm(
        restored(plain, learned), arm, batch_size=8, input_shape=(1, 8, 8), name="plain"
    ).model
    assert accuracy > accuracy_of(model) + 0.05
    assert accuracy > 0.75
    assert bool(found.preserved) == ("+ws" in arm)
    assert start.alterations_of(found, Protocol(weights=str(learned))).preserved == found.preserved


@pytest.mark.parametrize("arm", ["bn", "frozen-bn", "frozen-bn+ws", "bn+wn"])
def test_arms_that_can_start_as_the_pretrained_network_do(learned, arm):
    assert started(learned, arm)[1] == pytest.approx(started(learned, "bn")[1], abs=0.01)


def test_without_norms_a_run_starts_from_the_weights_alone(learned):
    built, _ = started(learned, "none")
    values = load_file(learned)
    assert all(torch.equal(value, values[at]) for at, value in built.model.state_dict().items())
