"""An optimizer continues unchanged for the parameters that stay."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from convert.net import Net
from normkit.convert import optimizer as edits

MAKERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}


def x(seed=0):
    return torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


def prepared(make):
    """A network after two steps, with the weights of norms, biases and the rest apart."""
    torch.manual_seed(0)
    model = Net().double()
    groups = nk.param_groups(model, weight_decay=0.1, bias_weight_decay=0.0)
    optimizer = make([dict(group, lr=0.01 * (i + 1)) for i, group in enumerate(groups)])
    train(model, optimizer)
    return model, optimizer


def train(model, optimizer, seeds=(0, 1)):
    for seed in seeds:
        optimizer.zero_grad()
        target = torch.arange(512).reshape(4, 128).sin()  # no gradient is zero but for rounding
        (model(x(seed)) - target).square().mean().backward()
        optimizer.step()


def options_of(optimizer):
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_training_goes_on_as_if_nothing_had_happened(make):
    plain, plain_optimizer = prepared(make)
    model, optimizer = prepared(make)
    nk.convert_norm_(model, "bn", optimizer=optimizer)
    train(plain, plain_optimizer, (2, 3, 4))
    train(model, optimizer, (2, 3, 4))
    for name, value in plain.state_dict().items():
        assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("spec", ["gn:2", "gnplus:4", "bcn:4", "ibn", "gn:2:affine=false", "sn"])
def test_groups_and_state_follow(make, spec):
    model, optimizer = prepared(make)
    states = {p: dict(state) for p, state in optimizer.state.items()}
    options = options_of(optimizer)
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    old = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    nk.convert_norm_(model, {"layer*": spec}, optimizer=optimizer)
    assert {*held(optimizer)} == {*model.parameters()}
    assert len(held(optimizer)) == len({*held(optimizer)})
    assert options_of(optimizer) == options
    for parameter, state in states.items():
        if parameter in {*model.parameters()}:
            assert optimizer.state[parameter].keys() == state.keys()
            assert all(optimizer.state[parameter][k] is v for k, v in state.items())
        else:
            assert parameter not in optimizer.state
    now = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for name, layer in old.items():
        for own, parameter in model.get_submodule(name).named_parameters():
            beside = layer.bias if own.endswith("bias") else layer.weight
            assert now[parameter] == group_of[beside], own
    train(model, optimizer)
    nk.convert_norm_(model, "bn", optimizer=optimizer)
    train(model, optimizer)


def test_a_frozen_layer_that_is_in_no_group_stays_out():
    model = Net()
    frozen = model.layer1[0].bn1.requires_grad_(False)
    out = {*frozen.parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p not in out], lr=0.1)
    count = len(held(optimizer))
    nk.convert_norm_(model, {"layer1.0.bn1": "gnplus:4"}, optimizer=optimizer)
    assert len(held(optimizer)) == count


def test_parameters_without_a_predecessor_are_said():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8), nn.InstanceNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = nk.convert_norm_(model, {"1": "gn:2:affine", "2": "gn:2"}, optimizer=optimizer)
    joined = ("1.weight, 1.bias joined the optimizer's first group",)
    assert [change.warnings for change in done.changes] == [joined, ()]
    assert {*held(optimizer)} == {*model.parameters()}
    done.revert()
    assert held(optimizer) == [*model.parameters()]


def test_names_in_the_groups_follow():
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    nk.convert_norm_(model, "gnplus:4", optimizer=optimizer)
    (group,) = optimizer.param_groups
    named = dict(model.named_parameters())
    assert len(group["param_names"]) == len(group["params"])
    pairs = zip(group["param_names"], group["params"], strict=True)
    assert all(named[name] is parameter for name, parameter in pairs)
    assert "layer1.0.bn1.mix_logit" in group["param_names"]


def test_a_tied_parameter_that_is_still_used_stays():
    model = Net()
    model.layer1[0].bn1.weight = model.layer2[0].bn1.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nk.convert_norm_(model, {"layer1.0.bn1": "gn:2:affine=false"}, optimizer=optimizer)
    assert any(model.layer2[0].bn1.weight is p for p in held(optimizer))
    assert {*held(optimizer)} == {*model.parameters()}


def test_a_schedule_goes_on():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    nk.convert_norm_(model, "bcn:4", optimizer=optimizer)
    train(model.double(), optimizer)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_another_models_optimizer_is_refused():
    other = torch.optim.SGD(Net().parameters(), lr=0.1)
    model = Net()
    with pytest.raises(nk.OptionError, match="holds no parameter of the model"):
        nk.convert_norm_(model, "gn:2", optimizer=other)
    with pytest.raises(nk.OptionError, match=r"given a list; it takes a torch.optim.Optimizer"):
        nk.convert_norm_(model, "gn:2", optimizer=[])
    assert isinstance(model.layer1[0].bn1, nn.BatchNorm2d)


class Outer(torch.optim.Optimizer):
    """Has another one inside, as those that are sharded over processes do."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (torch.optim.LBFGS, "LBFGS keeps one history for all parameters together"),
        (Outer, "Outer contains another optimizer with its own parameter groups"),
    ],
)
def test_an_optimizer_that_cannot_follow_is_refused_before_anything_changes(make, why):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = make(model.parameters())
    with pytest.raises(nk.OptionError, match=f"{why}, so it cannot be edited; nothing was"):
        nk.convert_norm_(model, "bcn:2", optimizer=optimizer)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_an_optimizer_of_matrices_takes_no_gains():
    layer = nn.Linear(6, 8)
    optimizer = torch.optim.Muon([layer.weight])
    exchange = edits.Exchange([("weight", layer.weight)], [("gain", nn.Parameter(torch.ones(8)))])
    with pytest.raises(nk.OptionError, match="Muon takes matrices only, so it cannot be edited"):
        edits.OptimizerEdit(optimizer, [exchange], layer.parameters())


def test_a_history_of_all_parameters_goes_on_where_they_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, 6, 6)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    nk.convert_norm_(model, "gn:2", optimizer=optimizer)
    optimizer.step(closure)


def test_an_optimizer_that_shares_its_groups_with_the_one_inside_follows():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = Outer(model.parameters())
    optimizer.param_groups = optimizer.inner.param_groups
    nk.convert_norm_(model, "bcn:2", optimizer=optimizer)
    held = {p for group in optimizer.inner.param_groups for p in group["params"]}
    assert held == set(model.parameters())
