"""Measures of gradients, and noise, against their definitions."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit as nk
from convert.networks import timm
from diagnostics.test_measures import assert_untouched, state
from normkit.errors import DataError, OptionError


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(6 * 9, 4),
    )  # fmt: skip


@pytest.fixture
def batches():
    torch.manual_seed(3)
    return [(torch.randn(6, 3, 5, 5), torch.randint(4, (6,))) for _ in range(3)]


@pytest.mark.parametrize("preserve", [False, True])
def test_lipschitz_terms_are_those_of_the_raw_gradient(batches, preserve):
    model = net().double()
    model[3] = nn.Identity()
    pairs = [(x.double() * 2 + 1, y) for x, y in batches]
    nk.standardize_weights_(model, preserve=preserve)
    found = nk.lipschitz_terms(model, pairs)
    assert [(row.name, row.num_filters) for row in found.layers] == [("0", 6)]
    raw = model[0].parametrizations.weight.original.detach()
    rule = model[0].parametrizations.weight[0]
    rows = raw.flatten(1)
    std = (rows.var(1, correction=0) + 1e-5).sqrt()[:, None]
    unit = ((rows - rows.mean(1, keepdim=True)) / std).requires_grad_()
    squares = mean = weight = 0.0
    for x, y in pairs:
        gain, offset = rule.gain_and_offset() if preserve else (torch.ones(6), torch.zeros(6))
        used = unit * gain.detach().double()[:, None] + offset.detach().double()[:, None]
        maps = functional.conv2d(x, used.view_as(raw), model[0].bias)
        loss = functional.cross_entropy(
            model[5](functional.batch_norm(maps, None, None, training=True).relu().flatten(1)), y
        )
        (g,) = torch.autograd.grad(loss, unit)
        squares += float(g.square().sum())
        mean += float((g.sum(1).square() / 27).sum())
        weight += float(((unit.detach() * g).sum(1).square() / 27).sum())
    assert found.layers[0].mean_share == pytest.approx(mean / squares, rel=1e-7)
    assert found.layers[0].weight_share == pytest.approx(weight / squares, rel=1e-7)
    assert 0 < mean / squares < 1


OPTIONS = {
    "small eps, small filters": {"eps": 1e-12},
    "large eps": {"eps": 1e-2},
    "unbiased": {"unbiased": True, "eps": 1e-12},
    "eps to the deviation": {"eps_to": "std", "eps": 1e-9},
    "gain": {"gain": True, "eps": 1e-12},
    "center alone": {"scale": False},
    "scale alone": {"center": False, "eps": 1e-12},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_lipschitz_terms_are_those_of_the_layers_own_options(name, batches):
    """What is left of the gradient by the raw weight is the rest, with the deviation used."""
    options = OPTIONS[name]
    model = net().double()
    model[3] = nn.Identity()
    with torch.no_grad():  # small, and without a mean where that is not subtracted
        model[0].weight.sub_(model[0].weight.mean((1, 2, 3), keepdim=True)).mul_(1e-3)
    pair = batches[0][0].double(), batches[0][1]
    nk.standardize_weights_(model, **options)
    (row,) = nk.lipschitz_terms(model, [pair]).layers
    raw = model[0].parametrizations.weight.original
    rows = raw.detach().flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    var = rows.square().sum(1) / (26 if options.get("unbiased") else 27)
    eps = options.get("eps", 1e-5)
    std = (var + eps).sqrt() if options.get("eps_to") != "std" else var.sqrt() + eps
    std = std if options.get("scale", True) else torch.ones_like(std)

    weight = model[0].weight.detach().requires_grad_()
    maps = functional.conv2d(pair[0], weight, model[0].bias)
    normed = functional.batch_norm(maps, None, None, training=True)
    loss = functional.cross_entropy(model[5](normed.relu().flatten(1)), pair[1])
    (g,) = torch.autograd.grad(loss, weight)
    whole = g.flatten(1).square().sum()
    unit = rows / std[:, None]
    along = (unit * g.flatten(1)).sum(1).square().sum() / (26 if options.get("unbiased") else 27)
    constant = g.flatten(1).sum(1).square().sum() / 27
    assert row.weight_share == pytest.approx(float(along / whole) * options.get("scale", True))
    assert row.mean_share == pytest.approx(float(constant / whole) * options.get("center", True))
    if name != "large eps":
        (left,) = torch.autograd.grad(functional.cross_entropy(model(pair[0]), pair[1]), raw)
        rest = (left.flatten(1) * std[:, None]).square().sum() / whole
        assert 1 - row.weight_share - row.mean_share == pytest.approx(float(rest), rel=1e-4)


def gradient(model, pair):
    model = copy.deepcopy(model).train()
    loss = functional.cross_entropy(model(pair[0]), pair[1])
    return loss.item(), [g.double() for g in torch.autograd.grad(loss, list(model.parameters()))]


def norm(tensors):
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def test_the_landscape_along_a_gradient_is_its_definition(batches):
    model = net()
    model[3] = nn.Identity()  # no random numbers: the definition is run apart
    found = nk.gradient_landscape(model, batches, rates=(0.1, 0.4))
    for step, pair in zip(found.steps, batches, strict=True):
        loss, grads = gradient(model, pair)
        losses, changes = [loss], []
        for rate in (0.1, 0.4):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for p, g in zip(moved.parameters(), grads, strict=True):
                    p.sub_(rate * g.to(p.dtype))
            value, there = gradient(moved, pair)
            losses.append(value)
            changes.append(norm([a - b for a, b in zip(there, grads, strict=True)]))
        assert step.min_loss == pytest.approx(min(losses), rel=1e-5)
        assert step.loss_range == pytest.approx(max(losses) - min(losses), rel=1e-4)
        assert step.max_gradient_change == pytest.approx(max(changes), rel=1e-4)
        smoothness = max(c / (r * norm(grads)) for c, r in zip(changes, (0.1, 0.4), strict=True))
        assert step.effective_smoothness == pytest.approx(smoothness, rel=1e-4)


def test_runs_at_several_rates_are_training(batches):
    model = net()
    model[3] = nn.Identity()
    found = nk.gradient_landscape(model, batches, protocol="multi_lr", rates=(0.01, 0.1))
    losses, changes = [], []
    for rate in (0.01, 0.1):
        run = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(run.parameters(), lr=rate, momentum=0.9)
        values, grads = [], []
        for x, y in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(run(x), y)
            loss.backward()
            values.append(loss.item())
            grads.append([p.grad.double().clone() for p in run.parameters()])
            optimizer.step()
        losses.append(values)
        changes.append(
            [norm([a - b for a, b in zip(n, o, strict=True)]) for o, n in pairwise(grads)]
        )
    for number, step in enumerate(found.steps):
        here = [run[number] for run in losses]
        assert (step.min_loss, step.max_loss) == pytest.approx((min(here), max(here)), rel=1e-5)
        assert step.effective_smoothness is None
        if number:
            moves = [run[number - 1] for run in changes]
            assert step.min_gradient_change == pytest.approx(min(moves), rel=1e-4)
            assert step.max_gradient_change == pytest.approx(max(moves), rel=1e-4)
    assert found.steps[0].max_gradient_change is None


def test_dropout_is_the_same_at_every_point(batches):
    model = net()
    tiny = nk.gradient_landscape(model, batches, rates=(1e-7,))
    assert all(step.loss_range < 1e-5 for step in tiny.steps)
    one = nk.gradient_landscape(model, batches, protocol="multi_lr", rates=(0.1, 0.1))
    assert all(step.loss_range == 0 for step in one.steps)


def test_chosen_parameters_alone_are_looked_at(batches):
    found = nk.gradient_landscape(net(), batches, params=lambda name, p: name == "5.weight")
    assert found.num_parameters == 6 * 9 * 4
    every = nk.gradient_landscape(net(), batches)
    assert found.steps[0].max_gradient_change < every.steps[0].max_gradient_change


MEASURES = {
    "lipschitz": nk.lipschitz_terms,
    "along": nk.gradient_landscape,
    "rates": lambda m, b: nk.gradient_landscape(m, b, protocol="multi_lr", rates=(0.1,)),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_measurement_leaves_the_model_as_it_was(measure, batches, monkeypatch):
    model = net()
    nk.standardize_weights_(model)
    model[1].eval()
    model(batches[0][0]).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = state(model)
    found = measure(model, batches)
    assert_untouched(model, before)
    assert found.reading.endswith(".")
    assert json.loads(found.to_json())["measure"] == type(found).__name__
    assert len(found.table().splitlines()) == len(found.rows) + 1
    assert found.plot().axes[0].get_lines()
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    original = functional.cross_entropy
    monkeypatch.setattr("normkit.diagnostics.lipschitz.functional.cross_entropy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(model, batches)
    assert_untouched(model, before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_noise_is_one_draw_a_group_in_training_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(2, 6), nn.BatchNorm2d(6))
    x = torch.randn(500, 6, 4, 4)
    model.requires_grad_(False)
    plain = model[0](x)
    with nk.add_output_noise(model, where=lambda _m, name: name == "0") as names:
        noise = model[0](x) - plain
        model.eval()
        assert torch.equal(model[0](x), plain)
    assert names == ("0",)
    groups = noise.unflatten(1, (2, 3)).flatten(2)
    assert (groups - groups[..., :1]).abs().max() < 1e-5
    drawn = groups[..., 0]
    assert drawn.mean() == pytest.approx(1e-3, abs=0.1)
    assert drawn.std() == pytest.approx(1.001, abs=0.1)
    assert torch.equal(model.train()[0](x), plain)
    with nk.add_output_noise(model, granularity="element", mean=5.0, std=0.5):
        noise = model[0](x) - plain
    assert noise.mean() == pytest.approx(5.0, abs=0.02)
    assert noise.std() == pytest.approx(0.5, abs=0.02)
    with nk.add_output_noise(model):
        noise = model[1](x) - model.eval()[1](x) * 0
    assert noise.shape == x.shape


class Turned(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_noise_of_norms_over_the_last_axis_is_a_draw_for_each_channel():
    torch.manual_seed(0)
    x = torch.randn(7, 5, 6)
    for norm in (nn.LayerNorm(6), nn.RMSNorm(6)):
        with nk.add_output_noise(norm):
            noise = norm(x).detach()
        noise -= norm(x).detach()
        assert (noise - noise[:, :1]).abs().max() < 1e-5
        assert noise[:, 0].std() > 0.5
    alone = nn.InstanceNorm1d(6)
    with nk.add_output_noise(alone):
        assert alone(x[0].T).shape == (6, 5)
    with pytest.raises(
        OptionError, match=r"axis of the output holds the channels: 0: its class .*Turned"
    ):
        nk.add_output_noise(nn.Sequential(Turned(6))).__enter__()
    with nk.add_output_noise(nn.Sequential(Turned(6)), granularity="element") as names:
        assert names == ("0",)


def test_noise_comes_before_an_activation_inside():
    model = nk.convert_norm(nn.Sequential(_with_activation()), "gn:2").model
    x = torch.randn(64, 6, 4, 4)
    with nk.add_output_noise(model, std=3.0):
        assert model(x).min() == 0  # the activation came last


def _with_activation():
    return timm.layers.BatchNormAct2d(6)


def test_what_cannot_be_measured_is_refused(batches):
    with pytest.raises(OptionError, match=r"no standardised weight; nk\.standardize_weights_"):
        nk.lipschitz_terms(net(), batches)
    with pytest.raises(DataError, match="a batch of type Tensor has no target"):
        nk.gradient_landscape(net(), [batches[0][0]])
    with pytest.raises(OptionError, match="protocol='both'"):
        nk.gradient_landscape(net(), batches, protocol="both")
    with pytest.raises(OptionError, match=r"rates=\(0,\) was given; every rate must be above 0"):
        nk.gradient_landscape(net(), batches, rates=(0,))
    with pytest.raises(OptionError, match="chooses none"):
        nk.gradient_landscape(net(), batches, params=lambda _name, _p: False)
    with pytest.raises(OptionError, match="std=-1"):
        nk.add_output_noise(net(), std=-1).__enter__()
    with pytest.raises(OptionError, match="has no norm"):
        nk.add_output_noise(nn.ReLU()).__enter__()
    standardised = net()
    nk.standardize_weights_(standardised)
    with pytest.raises(DataError, match="gave no batch"):
        nk.lipschitz_terms(standardised, [])
