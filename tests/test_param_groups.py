"""Groups are disjoint and exhaustive; decay towards one is the optimizer's own, on gamma - 1."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import normkit as nk
from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()
from torchvision import models  # noqa: E402 - its operators must be there first


class Residual(nn.Sequential):
    """A branch that is added back."""

    def forward(self, x):
        """Add the branch."""
        return x + super().forward(x)


def small():
    branch = Residual(nn.Conv2d(4, 4, 1), nk.GroupNorm(4, num_groups=2))
    others = (nn.Flatten(), nn.LSTM(8, 8), nn.MultiheadAttention(8, 2))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), branch, *others)


def named(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


def test_every_parameter_is_in_one_group():
    model = small()
    model.append(nk.BatchChannelNorm(8, num_groups=2))
    model.append(nk.SwitchableNorm(8))
    parametrizations.weight_norm(model[2][0])
    nk.weights.standardize_weights_(model, lambda m, n: n == "0", preserve=True)
    groups = nk.param_groups(model, 0.1, 0.2, 0.3)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.3, 0.2, 0.2]
    found = named(model, groups)
    assert list(found) == ["weights", "biases", "norm_weights", "norm_biases"]
    everything = sorted(name for name, _ in model.named_parameters())
    assert sorted(itertools.chain(*found.values())) == everything
    assert found["biases"] == [
        "0.bias", "2.0.bias", "4.bias_ih_l0", "4.bias_hh_l0", "5.in_proj_bias", "5.out_proj.bias",
    ]  # fmt: skip
    stages = {"6.batch.weight", "6.channel.weight"}
    assert set(found["norm_weights"]) == {"1.weight", "2.1.weight", *stages, "7.weight"}
    assert "7.mean_logits" in found["norm_biases"]
    assert {"0.parametrizations.weight.original", "0.parametrizations.weight.0.length"} <= {
        *found["weights"]
    }


def test_a_parametrised_norm_keeps_its_groups():
    norm = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    found = named(norm, nk.param_groups(norm, 0.1))
    assert found["norm_weights"] == ["parametrizations.weight.original"]


def test_the_default_is_the_same_decay_for_all():
    assert [g["weight_decay"] for g in nk.param_groups(small(), 0.1, 0.1)] == [0.1] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [g["weight_decay"] for g in nk.param_groups(small(), 0.1)] == [0.1] * 4


def test_tied_parameters_appear_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    found = named(model, nk.param_groups(model, 0.1))
    assert (found["weights"], found["biases"]) == (["0.weight"], ["0.bias", "1.bias"])
    assert found["norm_weights"] == found["norm_biases"] == []


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "adamw_foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_empty_groups_are_no_trouble(make):
    model = nn.Linear(2, 2, bias=False)
    optimizer = make(nk.param_groups(model, 0.1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def loss_of(norm, x):
    return (norm(x) * x.roll(1, 0)).sum()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_decay_towards_one_is_decay_of_the_distance(make):
    """The same optimizer on a norm whose weight is written 1 + delta, and delta decays to 0."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.delta, self.bias = (
                nn.Parameter(torch.full((4,), 0.5)),
                nn.Parameter(torch.zeros(4)),
            )

        def forward(self, x):
            """Batch norm with weight 1 + delta."""
            return nn.functional.batch_norm(x, None, None, 1 + self.delta, self.bias, True)

    ours, theirs = nn.BatchNorm1d(4, track_running_stats=False).double(), Shifted().double()
    nn.init.constant_(ours.weight, 1.5)
    optimizer = make(nk.param_groups(ours, 0.3, decay_gamma_to=1))
    assert optimizer.param_groups[2]["weight_decay"] == 0
    nk.decay_gamma_to_one(optimizer)
    reference = make([{"params": theirs.parameters(), "weight_decay": 0.3}])
    x = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(5):
        for norm, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            loss_of(norm, x).backward()
            each.step()
        assert_close(ours.weight, 1 + theirs.delta)
        assert_close(ours.bias, theirs.bias)
        assert optimizer.param_groups[2]["weight_decay"] == 0


def test_decay_towards_one_is_hand_written_sgd():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    nn.init.constant_(norm.weight, 0.2)
    gamma, beta = norm.weight.detach().clone(), norm.bias.detach().clone()
    optimizer = torch.optim.SGD(nk.param_groups(norm, 0.5, decay_gamma_to=1), lr=0.1, momentum=0.9)
    nk.decay_gamma_to_one(optimizer)
    x, speed = torch.randn(8, 4), [0, 0]
    for _ in range(4):
        norm.zero_grad()
        loss_of(norm, x).backward()
        pulls = (norm.weight.grad + 0.5 * (gamma - 1), norm.bias.grad + 0.5 * beta)
        speed = [0.9 * v + pull for v, pull in zip(speed, pulls, strict=True)]
        gamma, beta = gamma - 0.1 * speed[0], beta - 0.1 * speed[1]
        optimizer.step()
        assert_close(norm.weight.detach(), gamma)
        assert_close(norm.bias.detach(), beta)


def decaying(norm, make=OPTIMIZERS["sgd"]):
    optimizer = make(nk.param_groups(norm, 0.5, decay_gamma_to=1))
    nk.decay_gamma_to_one(optimizer)
    return optimizer


def test_a_closure_and_a_failing_step_see_the_weights_as_they_are():
    norm = nn.BatchNorm1d(4)
    optimizer = decaying(norm)
    seen = []

    def closure():
        seen.append(norm.weight.detach().clone())
        loss = loss_of(norm, torch.ones(3, 4))
        loss.backward()
        return loss

    optimizer.step(closure)
    before = norm.weight.detach().clone()
    optimizer.step(closure)
    assert_close(seen, [torch.ones(4), before])

    def failing():
        closure()
        raise ValueError("in the middle")

    before = norm.weight.detach().clone()
    with pytest.raises(ValueError, match="in the middle"):
        optimizer.step(failing)
    assert_close(norm.weight.detach(), before)
    assert optimizer.param_groups[2]["weight_decay"] == 0


def test_weights_without_a_gradient_are_untouched():
    norm = nn.BatchNorm1d(4)
    nn.init.constant_(norm.weight, 1e-9)  # subtracting and adding one would round it away
    decaying(norm).step()
    assert_close(norm.weight.detach(), torch.full((4,), 1e-9), rtol=0, atol=0)


def test_schedulers_and_state_dicts_go_on_working():
    norm = nn.BatchNorm1d(4)
    optimizer = decaying(norm)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss_of(norm, torch.randn(5, 4)).backward()
    optimizer.step()
    scheduler.step()
    other = decaying(copy.deepcopy(norm))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[2]["decay_to_one"] == 0.5
    assert other.param_groups[2]["lr"] == pytest.approx(0.01)


def test_without_the_helper_the_flagged_group_does_not_decay():
    norm = nn.BatchNorm1d(4)
    optimizer = torch.optim.SGD(nk.param_groups(norm, 0.5, decay_gamma_to=1), lr=0.1)
    norm.weight.grad = torch.zeros(4)
    optimizer.step()
    assert_close(norm.weight.detach(), torch.ones(4))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_residual_networks_get_no_warning(name):
    nk.param_groups(models.get_model(name, weights=None), 1e-4)


@pytest.mark.parametrize(("name", "undone"), [("inception_v3", "89 of 96"), ("vgg11_bn", "7 of 8")])
def test_networks_without_residual_paths_get_a_warning(name, undone):
    options = {"init_weights": False} if name == "inception_v3" else {}
    model = models.get_model(name, weights=None, **options)
    with pytest.warns(
        UserWarning, match=rf"{undone} norms \(.* and \d+ more\) have no residual path to"
    ):
        nk.param_groups(model, 1e-4)
    nk.param_groups(model, 1e-4, norm_weight_decay=0)


def test_a_single_norm_before_the_output_gets_no_warning():
    nk.param_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), 1e-4)


class Shift(nn.Module):
    """A sum that joins no branches."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(1))

    def forward(self, x):
        """Add a number and a parameter."""
        return x + 1 + self.by


def test_a_sum_with_a_constant_is_no_residual_path():
    norms = (nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model = nn.Sequential(norms[0], Shift(), nn.Conv2d(4, 4, 1), norms[1])
    with pytest.warns(UserWarning, match=r"1 of 2 norms \(0\) have no residual path"):
        nk.param_groups(model, 1e-4)


class Untraceable(nn.Sequential):
    """Asks for values."""

    def forward(self, x):
        """Go on, whatever the answer."""
        return super().forward(x if x.sum() > 0 else -x)


def test_a_model_that_cannot_be_followed_says_so_unless_the_decay_is_chosen():
    model = Untraceable(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    with pytest.warns(
        UserWarning, match=r"could not be traced: .*example_input=.*norm_weight_decay="
    ):
        nk.param_groups(model, 1e-4)
    nk.param_groups(model, 1e-4, norm_weight_decay=1e-4)
    with pytest.warns(UserWarning, match=r"1 of 2 norms \(1\) have no residual path"):
        nk.param_groups(model, 1e-4, example_input=torch.ones(2, 3, 2, 2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: nk.param_groups(m, -1.0), "weight decay of -1.0 was given for weights"),
        (
            lambda m: nk.param_groups(m, 0.1, float("nan")),
            "decay of nan was given for norm_weights",
        ),
        (
            lambda m: nk.param_groups(m, 0.1, bias_weight_decay=-2),
            "decay of -2 was given for biases",
        ),
        (
            lambda m: nk.param_groups(m, 0.1, decay_gamma_to=2),
            "decay_gamma_to=2 was given; it must be 0 or 1",
        ),
        (
            lambda m: nk.decay_gamma_to_one(torch.optim.SGD(m.parameters())),
            "no group of the SGD decays",
        ),
        (lambda m: nk.decay_gamma_to_one(decaying(m)), "this SGD decays towards one already"),
    ],
)
def test_what_makes_no_sense_is_refused(call, text):
    with pytest.raises(nk.OptionError, match=text):
        call(nn.BatchNorm1d(4))
