"""Attacks stay in their ball, raise the loss, and leave the network as it is."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from normkit import BatchChannelNorm, BatchNorm
from normkit.lab.data.dataset import Scaling
from normkit.lab.tasks.attack import (
    Attack,
    PixelRange,
    autocast_of,
    buffers_kept,
    evaluation_mode,
)

SCALING = Scaling(
    mean=torch.tensor([120.0, 60.0]).view(1, 2, 1, 1),
    std=torch.tensor([50.0, 80.0]).view(1, 2, 1, 1),
)
BYTES = PixelRange.of(SCALING, 0, 255)


def pictures(num=6, size=5):
    """Pictures of bytes with black and white pixels among them, scaled, and classes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-60, 316, (num, 2, size, size), generator=generator).clamp(0, 255)
    return SCALING(values.byte()), torch.arange(num) % 3


def network(size=5):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), BatchNorm(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * size * size, 3),
    ).eval()  # fmt: skip


def attack(**changes):
    options = {"epsilon": 8 / 255, "step_size": 3 / 255, "num_steps": 5, "pixels": BYTES}
    return Attack(**(options | changes))


def pixels_of(inputs):
    """Pixels between 0 and 1, by the definition of scaling and in float64."""
    mean, std = (t.double().numpy() for t in (SCALING.mean, SCALING.std))
    return (inputs.double().numpy() * std + mean) / 255


def loss_of(model, inputs, targets):
    return functional.cross_entropy(model(inputs), targets).item()


@pytest.mark.parametrize("num_steps", [1, 4, 20])
@pytest.mark.parametrize("random_start", [True, False])
def test_no_pixel_leaves_the_ball_or_the_range(num_steps, random_start):
    inputs, targets = pictures()
    found = attack(num_steps=num_steps, random_start=random_start)(network(), inputs, targets)
    before, after = pixels_of(inputs), pixels_of(found)
    moved = np.abs(after - before)
    assert moved.max() <= 8 / 255 + 1e-6
    assert after.min() >= -1e-6
    assert after.max() <= 1 + 1e-6
    inside = (before > 9 / 255) & (before < 1 - 9 / 255)
    if num_steps == 20:  # then most pixels are at the border of the ball
        assert (moved[inside] > 8 / 255 - 1e-6).mean() > 0.5


def test_the_random_start_alone_is_spread_over_the_ball():
    inputs = torch.zeros(4, 2, 30, 30)
    found = attack(num_steps=0)(network(30), inputs, torch.zeros(4).long())
    moved = (pixels_of(found) - pixels_of(inputs)).ravel() / (8 / 255)
    assert np.abs(moved.mean()) < 0.05
    assert moved.std() == pytest.approx(1 / np.sqrt(3), rel=0.02)  # uniform in [-1, 1]
    assert moved.min() < -0.99
    assert moved.max() > 0.99


def test_it_is_what_its_definition_in_pixels_gives():
    """The definition: pixels in [0, 1], float64, one picture at a time, the network scales."""
    model = network().double()
    inputs, targets = pictures()
    inputs = inputs.double()
    mean, std = SCALING.mean.double() / 255, SCALING.std.double() / 255

    def by_definition(picture, target):
        epsilon, step = 8 / 255, 3 / 255
        x = picture.clone()
        for _ in range(5):
            x.requires_grad_()
            loss = functional.cross_entropy(model((x - mean) / std), target)
            (gradient,) = torch.autograd.grad(loss, x)
            x = x.detach() + step * torch.sign(gradient)
            x = torch.min(torch.max(x, picture - epsilon), picture + epsilon)
            x = torch.clamp(x, 0, 1)
        return x

    found = attack(random_start=False)(model, inputs, targets)
    for at in range(len(inputs)):
        expected = by_definition(
            torch.from_numpy(pixels_of(inputs[at : at + 1])), targets[at : at + 1]
        )
        np.testing.assert_allclose(
            pixels_of(found[at : at + 1]), expected.numpy(), atol=1e-7
        )  # black is float32


def test_a_linear_network_is_attacked_as_well_as_can_be():
    """With two classes, the best change is the sign of the difference of the classes' weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2)).double()
    inputs, targets = pictures()
    inputs, targets = inputs.double(), targets % 2
    weights = model[1].weight.detach()
    worse = (weights[1 - targets] - weights[targets]).reshape(inputs.shape).sign()
    unit = BYTES.unit.double()
    best = (inputs + 8 / 255 * unit * worse).clamp(BYTES.low.double(), BYTES.high.double())
    found = attack(num_steps=6)(model, inputs, targets)  # 6 * 3 > 2 * 8: through the whole ball
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


def test_the_loss_rises_step_by_step_and_above_that_of_noise():
    model, (inputs, targets) = network(), pictures(60)
    losses = [
        loss_of(model, attack(num_steps=n, random_start=False)(model, inputs, targets), targets)
        for n in (0, 1, 5, 20)
    ]
    assert losses[0] == loss_of(model, inputs, targets)
    assert losses == sorted(losses)
    noise = inputs + 8 / 255 * BYTES.unit * torch.randn_like(inputs).sign()
    noise = noise.clamp(BYTES.low, BYTES.high)
    assert losses[2] - losses[0] > 5 * abs(loss_of(model, noise, targets) - losses[0])


def test_it_leaves_no_gradient_and_no_graph():
    model, (inputs, targets) = network(), pictures()
    with torch.no_grad():  # as evaluation is
        found = attack()(model, inputs, targets)
    assert not found.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_generator_repeats_the_start_and_leaves_torchs_alone():
    model, (inputs, targets) = network(), pictures()
    before = torch.get_rng_state()
    one, other, third = (
        attack()(model, inputs, targets, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(before, torch.get_rng_state())


def test_pictures_that_are_not_scaled_go_from_low_to_high():
    pixels = PixelRange.of(None, 0, 1)
    inputs = torch.tensor([0.0, 0.01, 0.5, 1.0]).view(1, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    found = attack(pixels=pixels, epsilon=0.1, step_size=0.1)(model, inputs, torch.tensor([0]))
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - inputs).abs().max() == pytest.approx(0.1, abs=1e-6)


def test_modes_are_put_back_module_by_module():
    model = network().train()
    model[1].training = False  # as a norm whose statistics stand still

    def interrupted():
        with evaluation_mode(model):
            assert not any(m.training for m in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert [m.training for m in model] == [True, False, True, True, True]


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm2d, BatchChannelNorm])
def test_statistics_do_not_move_in_the_block_and_gradients_flow_through_it(norm):
    options = {"num_groups": 2, "micro_batch": True} if norm is BatchChannelNorm else {}
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4, **options)).train()
    inputs, _ = pictures()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    with buffers_kept(model):
        loss = model(inputs).square().sum()
    model(inputs)  # moves the statistics before the backward pass
    loss.backward()
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(value is buffers[name] for name, value in model.named_buffers())
    with buffers_kept(model):
        model(inputs + 5)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    moved = [n for n, v in before.items() if not torch.equal(v, after[n])]
    assert moved  # by the forward outside
    model.load_state_dict(before)
    model(inputs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), name  # by that one only


def test_shared_norms_stay_shared():
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(norm, norm)
    with buffers_kept(model):
        assert model[0].running_mean is model[1].running_mean
        model(torch.randn(3, 2, 4, 4))
    assert int(norm.num_batches_tracked) == 0


def test_precision_around_the_attack_is_the_trainings():
    with autocast_of("bf16-mixed", torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.bfloat16
    with autocast_of("32-true", torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32
