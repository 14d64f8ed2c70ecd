import math

import pytest
import torch
from torch import nn

from normkit.errors import SpecError
from normkit.lab.data import Dataset, Examples
from normkit.lab.loop import Loop, grouped, num_updates, own_parts
from normkit.lab.recipe import Recipe, Timetable
from normkit.lab.spec import Protocol
from normkit.lab.tasks.classification import ClassificationRun


def rates(recipe, steps_per_epoch=4, step_examples=128):
    timetable = Timetable(recipe, steps_per_epoch, step_examples)
    return [timetable.rate(step) for step in range(timetable.num_steps)]


def test_the_rate_is_scaled_with_the_examples_of_a_step_unless_told_not_to():
    assert rates(Recipe(epochs=1, schedule="constant"), step_examples=32) == [0.025] * 4
    fixed = Recipe(epochs=1, schedule="constant", lr_batch_size=None)
    assert rates(fixed, step_examples=32) == [0.1] * 4


def test_a_list_drops_between_epochs_as_the_papers_do():
    """A tenth after 81 and after 122 of 164 epochs."""
    found = rates(Recipe(epochs=164), steps_per_epoch=3)
    expected = [0.1] * 81 + [0.01] * 41 + [0.001] * 42
    assert found == pytest.approx([rate for rate in expected for _ in range(3)], rel=1e-12)


def test_a_list_may_say_what_the_rate_is_after_each_drop():
    """As Gidaris and Komodakis: 0.1, and 0.006, 0.0012, 0.00024 from epochs 20, 40 and 50 of 60."""
    recipe = Recipe(
        epochs=60, lr_drops=(20 / 60, 40 / 60, 50 / 60), lr_values=(0.06, 0.012, 0.0024)
    )
    expected = [0.1] * 20 + [0.006] * 20 + [0.0012] * 10 + [0.00024] * 10
    assert rates(recipe, steps_per_epoch=1) == pytest.approx(expected, rel=1e-12)
    assert "0.06 and 0.012 and 0.0024 of it after 33 % and 67 % and 83 %" in recipe.sentence
    with pytest.raises(SpecError, match="2 lr_values for 3 lr_drops; give one for each drop"):
        Recipe.checked({"epochs": 60, "lr_drops": (0.2, 0.4, 0.6), "lr_values": (0.1, 0.01)})


def test_a_step_schedule_drops_every_so_many_epochs():
    found = rates(Recipe(epochs=5, schedule="step", lr_every=2), steps_per_epoch=2)
    assert found == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 2)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("polynomial", lambda t: (1 - t) ** 0.9),
        ("exponential", lambda t: 0.1**t),
        ("constant", lambda t: 1.0),
    ],
)
def test_smooth_schedules_follow_their_formulas_step_by_step(schedule, formula):
    found = rates(Recipe(epochs=2, schedule=schedule))
    assert found == pytest.approx([0.1 * formula(step / 8) for step in range(8)])


def test_the_cosine_is_that_of_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(Recipe(epochs=2, schedule="cosine")) == pytest.approx(expected)


def test_a_warm_up_grows_by_equal_parts_and_the_schedule_follows_it():
    found = rates(Recipe(epochs=3, schedule="cosine", warmup=0.5))
    assert found[:2] == pytest.approx([0.05, 0.1])
    assert found[2:] == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])


def test_steps_stand_in_place_of_epochs():
    recipe = Recipe(steps=10, schedule="constant")
    assert recipe.epochs is None
    assert Timetable(recipe, 4, 128).num_epochs == 3
    with pytest.raises(SpecError, match=r"epochs=4 and steps=10; give one of them"):
        Recipe.checked({"epochs": 4, "steps": 10})


def test_each_process_takes_its_part_of_every_batch():
    order = torch.arange(22)
    first, second = (own_parts(order, 4, rank, 2) for rank in (0, 1))
    assert [p.tolist() for p in first] == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18]]
    assert [p.tolist() for p in second] == [[4, 5, 6, 7], [12, 13, 14, 15], [19, 20, 21]]
    alone = [p.tolist() for p in own_parts(torch.arange(9), 4, 0, 1)]
    assert alone == [[0, 1, 2, 3], [4, 5, 6, 7]]  # a last single example is left out
    assert num_updates(22, 4, Protocol(accumulate=2, processes=2)) == 2
    assert [len(part) for part in grouped([order] * 5, 2)] == [2, 2, 1]


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def examples(num, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num, 3, 2, 2, generator=generator)
    return Examples(inputs=inputs, targets=torch.randint(3, (num,), generator=generator))


def loop_of(**recipe):
    protocol = Protocol(**recipe)
    return loop_with(small_net(), protocol)


def loop_with(net, protocol):
    whole = examples(10)
    dataset = Dataset(name="drawn", num_classes=3, train=whole, validation=whole, test=whole)
    run = ClassificationRun(net, protocol, dataset)
    return Loop(net, protocol, 0.1, torch.device("cpu"), run)


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Parts of different lengths, each weighted by its examples; float64 as the oracle."""
    whole = examples(10)
    parts = [whole.take(torch.arange(0, 4)), whole.take(torch.arange(4, 10))]
    loop = loop_of(accumulate=2)
    step = loop.step(parts)
    net = small_net().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scores = net(whole.inputs.double())
    loss = nn.functional.cross_entropy(scores, whole.targets)
    loss.backward()
    optimizer.step()
    assert step.loss == pytest.approx(loss.item(), rel=1e-6)
    assert step.num_right == (scores.argmax(1) == whole.targets).sum()
    torch.testing.assert_close(
        weights_of(loop.network).double(), weights_of(net), rtol=1e-5, atol=1e-7
    )


def test_a_gradient_is_clipped_to_its_largest_norm():
    loop = loop_of(clip=0.01, momentum=0.0, weight_decay=0.0)
    before = weights_of(loop.network)
    loop.step([examples(10)])
    moved = (weights_of(loop.network) - before).norm()
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
        ("nesterov", lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True)),
        ("adam", lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01)),
    ],
)
def test_optimizers_are_those_of_torch(name, oracle):
    loop, net = loop_of(optimizer=name, weight_decay=0.01), small_net()
    optimizer = oracle(net.parameters())
    for seed in range(3):
        batch = examples(10, seed)
        loop.step([batch])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch.inputs), batch.targets).backward()
        optimizer.step()
    torch.testing.assert_close(weights_of(loop.network), weights_of(net), rtol=1e-5, atol=1e-6)


def test_norms_decay_by_a_rate_of_their_own():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.LayerNorm(3))
    loop = loop_with(net, Protocol(norm_weight_decay=0.0))
    decay = {id(p): g["weight_decay"] for g in loop.optimizer.param_groups for p in g["params"]}
    assert decay[id(net[2].weight)] == decay[id(net[2].bias)] == 0.0
    assert decay[id(net[1].weight)] == 1e-4


def test_scales_of_norms_decay_towards_one():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.LayerNorm(3))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([0.5, 1.0, 3.0]))
        net[1].weight.zero_()  # every output is the bias, and no gradient reaches the scale
        net[1].bias.zero_()
    recipe = {"base_lr": 0.1, "lr_batch_size": None, "weight_decay": 0.5, "momentum": 0.0}
    loop = loop_with(net, Protocol(**recipe, decay_gamma_to=1))
    loop.step([examples(10)])
    expected = torch.tensor([0.5, 1.0, 3.0]) - 0.1 * 0.5 * torch.tensor([-0.5, 0.0, 2.0])
    torch.testing.assert_close(net[2].weight.detach(), expected)
    assert "norms' scales decay towards 1" in Protocol(decay_gamma_to=1).sentence


def test_label_smoothing_and_mixup_change_the_loss_as_defined():
    batch = examples(10)
    smoothed = loop_of(label_smoothing=0.2).step([batch]).loss
    logs = small_net()(batch.inputs).log_softmax(1).double()
    picked = logs.gather(1, batch.targets[:, None]).squeeze(1)
    expected = -(0.8 * picked + 0.2 * logs.mean(1)).mean()
    assert smoothed == pytest.approx(expected.item(), rel=1e-5)
    torch.manual_seed(3)
    mixed = loop_of(mixup=0.4)
    torch.manual_seed(3)
    loss = mixed.step([batch]).loss
    torch.manual_seed(3)
    share = torch._sample_dirichlet(torch.tensor([0.4, 0.4]))[0].item()
    inputs = share * batch.inputs + (1 - share) * batch.inputs.roll(1, 0)
    logs = small_net()(inputs).log_softmax(1)
    ones = nn.functional.one_hot(batch.targets, 3)
    soft = share * ones + (1 - share) * ones.roll(1, 0)
    assert loss == pytest.approx(-(soft * logs).sum(1).mean().item(), rel=1e-4)


def test_bfloat16_is_close_and_the_weights_stay_float32():
    plain, mixed = loop_of(), loop_of(precision="bf16-mixed")
    losses = [loop.step([examples(32)]).loss for loop in (plain, mixed)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {p.dtype for p in mixed.network.parameters()} == {torch.float32}


def test_half_precision_needs_a_gpu():
    with pytest.raises(SpecError, match=r"16-mixed needs a GPU; on the CPU give bf16-mixed or 32"):
        loop_of(precision="16-mixed")


def test_a_network_that_gives_something_else_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    loop = loop_with(net, Protocol())
    with pytest.raises(Exception, match=r"gave \(10, 5\) for 10 examples of 3 classes"):
        loop.step([examples(10)])
