"""Group norms that are random in training: their definitions, and group norm at evaluation."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from normkit.errors import OptionError
from normkit.lab.stochastic import NoisyGroupNorm, ScheduledGroupNorm, ShuffledGroupNorm

SHAPE = (3, 8, 5, 2)


def drawn(norm):
    """The layer in float64 with random parameters, and an input with an offset."""
    torch.manual_seed(0)
    norm = norm.double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(SHAPE, dtype=torch.float64) * 2 + 5
    return norm, x


def group_norm(norm, x, groups):
    return functional.group_norm(x, groups, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize(
    "norm",
    [
        NoisyGroupNorm(8, num_groups=4, noise=0.5),
        ShuffledGroupNorm(8, num_groups=4),
        ScheduledGroupNorm(8, num_groups=4, direction="shrinking", length=10),
    ],
)
def test_evaluation_is_group_norm(norm):
    norm, x = drawn(norm.eval())
    assert_close(norm(x), group_norm(norm, x, 4))


def test_without_noise_training_is_group_norm():
    norm, x = drawn(NoisyGroupNorm(8, num_groups=4, noise=0.0))
    norm.train()
    assert_close(norm(x), group_norm(norm, x, 4))


def test_noise_is_a_share_of_the_moving_average_of_the_variances():
    """With a constant variance the disturbed means have the standard deviation that is said."""
    torch.manual_seed(0)
    norm = NoisyGroupNorm(4, num_groups=2, noise=0.1, rate=1.0, affine=False)
    x = torch.tensor([-3.0, 3.0]).repeat(4000, 4, 1)  # mean 0, variance 9
    y = norm(x).unflatten(1, (2, 2))
    mean, spread = y.mean((2, 3)), y.std((2, 3), correction=0)
    assert norm.average_var.tolist() == [9.0, 9.0]
    variance = (3 / spread).square()  # of what was divided by
    assert variance.mean() == pytest.approx(9, rel=0.01)
    assert variance.std() == pytest.approx(0.9, rel=0.05)
    assert (mean * variance.sqrt()).std() == pytest.approx(0.3, rel=0.05)


def test_noise_is_a_constant_for_the_gradient():
    norm, x = drawn(NoisyGroupNorm(8, num_groups=4, noise=0.3, rate=0.0).train())

    def call(x):
        torch.manual_seed(1)
        return norm(x)

    assert torch.autograd.gradcheck(call, x.requires_grad_())


def test_groups_are_drawn_and_each_channel_keeps_its_place():
    norm, x = drawn(ShuffledGroupNorm(8, num_groups=2).train())
    torch.manual_seed(4)
    y = norm(x)
    torch.manual_seed(4)
    torch.rand((), device="cpu")
    order = torch.randperm(8).tolist()
    assert [order[at] for at in order] != list(range(8))  # the way back is another order
    for group in (order[:4], order[4:]):
        values = x[:, group]
        mean = values.mean((1, 2, 3), keepdim=True)
        var = values.var((1, 2, 3), keepdim=True, correction=0)
        plain = (values - mean) / (var + norm.eps).sqrt()
        expected = plain * norm.weight[group].view(-1, 1, 1) + norm.bias[group].view(-1, 1, 1)
        assert_close(y[:, group], expected)
    assert not torch.allclose(y, group_norm(norm, x, 2))


def test_a_share_of_the_steps_draws_groups():
    norm, x = drawn(ShuffledGroupNorm(8, num_groups=2, share=0.25).train())
    plain = group_norm(norm, x, 2)
    drew = [not torch.allclose(norm(x), plain) for _ in range(400)]
    assert sum(drew) == pytest.approx(100, abs=30)


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("growing", [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8]),
        ("shrinking", [8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1]),
    ],
)
def test_the_number_of_groups_changes_with_the_steps(direction, expected):
    norm, x = drawn(ScheduledGroupNorm(8, num_groups=8, direction=direction, length=9).train())
    for groups in expected:
        assert norm.present_groups == groups
        assert_close(norm(x), group_norm(norm, x, groups))
    norm.eval()
    assert_close(norm(x), group_norm(norm, x, expected[-1]))
    restored = ScheduledGroupNorm(8, num_groups=8, direction=direction, length=9)
    restored.load_state_dict(norm.state_dict())
    assert restored.present_groups == expected[-1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NoisyGroupNorm(8, num_groups=4, noise=-1.0), r"noise=-1.0 .*0 or more"),
        (lambda: NoisyGroupNorm(8, num_groups=4, rate=2.0), r"rate=2.0 .*from 0 to 1"),
        (lambda: ShuffledGroupNorm(8, num_groups=4, share=1.5), r"share=1.5"),
        (lambda: ScheduledGroupNorm(12, num_groups=6), r"num_groups=6 .* power of two"),
        (lambda: ScheduledGroupNorm(8, num_groups=4, direction="up"), r"direction"),
        (lambda: ScheduledGroupNorm(8, num_groups=4, length=0), r"length=0"),
    ],
)
def test_bad_options_are_answered_in_a_sentence(make, said):
    with pytest.raises(OptionError, match=said):
        make()


def test_they_end_in_an_activation_as_every_layer():
    norm, x = drawn(ShuffledGroupNorm(8, num_groups=2, share=0.0, activation="relu").train())
    assert_close(norm(x, residual=x), (group_norm(norm, x, 2) + x).relu())
