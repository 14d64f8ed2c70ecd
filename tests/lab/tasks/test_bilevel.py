"""Gradients of a bilevel search, against autograd through the weights' step."""

import pytest
import torch
from torch import nn

from normkit.lab.models.genotype import OPERATIONS
from normkit.lab.models.operations import Mixed
from normkit.lab.tasks.bilevel import (
    ArchitectureOptimizer,
    WeightStep,
    gradients_of,
    second_order_gradients,
)


def problem(seed=0):
    """Two losses of a bilinear map that depends on both kinds of parameters."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    alpha, w = randn(3).requires_grad_(), randn(3, 4).requires_grad_()
    x, y, xv, yv = randn(8, 4), randn(8), randn(8, 4), randn(8)

    def loss(alpha, w, x, y):
        return ((torch.tanh(x @ w.T) * alpha.softmax(0)).sum(1) - y).square().mean()

    return alpha, w, (x, y), (xv, yv), loss


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_second_order_gradient_is_autograds_through_the_step(momentum, weight_decay):
    alpha, w, train, held, loss = problem()
    buffer, rate = torch.full_like(w, 0.3), 0.2
    step = WeightStep(rate=rate, momentum=momentum, weight_decay=weight_decay, buffers={w: buffer})
    before = w.detach().clone()
    (found,) = second_order_gradients(
        lambda: loss(alpha, w, *train), lambda: loss(alpha, w, *held), [alpha], [w], step
    )
    (inner,) = torch.autograd.grad(loss(alpha, w, *train), w, create_graph=True)
    stepped = w - rate * (inner + weight_decay * w.detach() + momentum * buffer)
    (expected,) = torch.autograd.grad(loss(alpha, stepped, *held), alpha)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    first_order = gradients_of(loss(alpha, w, *held), [alpha])[0]
    assert (first_order - expected).norm() > 0.01 * expected.norm()  # the second term counts
    assert torch.equal(w, before)


def test_weights_come_back_when_a_loss_fails():
    alpha, w, train, _, loss = problem()
    before = w.detach().clone()

    def fail():
        raise RuntimeError("lost")

    step = WeightStep(rate=0.1, buffers={})
    with pytest.raises(RuntimeError, match="lost"):
        second_order_gradients(lambda: loss(alpha, w, *train), fail, [alpha], [w], step)
    assert torch.equal(w, before)


def test_what_a_loss_does_not_depend_on_has_gradient_zero():
    alpha, w, train, _, loss = problem()
    other = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert gradients_of(loss(alpha, w, *train), [other])[0].tolist() == [0, 0]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("best", ["max_pool_3x3", "sep_conv_3x3", "skip_connect", "none"])
def test_the_search_finds_the_operation_that_made_the_targets(best, order):
    torch.manual_seed(0)
    mixed = Mixed(OPERATIONS, 2, 1)
    x = torch.randn(4, 2, 4, 4)
    known = mixed.operations[OPERATIONS.index(best)]
    y = known(x).detach()  # of the same weights, so that only the choice is to be learned
    alpha = nn.Parameter(torch.zeros(len(OPERATIONS)))
    weights = list(mixed.parameters())
    optimizer = ArchitectureOptimizer([alpha], rate=0.2, weight_decay=0.0)

    def loss():
        return (mixed(x, alpha.softmax(0)) - y).square().mean()

    for _ in range(12):
        if order == 1:
            found = gradients_of(loss(), [alpha])
        else:
            step = WeightStep(rate=1e-4, buffers={})
            found = second_order_gradients(loss, loss, [alpha], weights, step)
        optimizer.step(found)
    assert OPERATIONS[int(alpha.argmax())] == best


def test_adam_goes_on_from_its_state():
    def optimized(steps, state=None, start=None):
        alpha = nn.Parameter(torch.ones(3) if start is None else start.clone())
        optimizer = ArchitectureOptimizer([alpha], rate=0.1, weight_decay=0.1)
        if state is not None:
            optimizer.load_state(state)
        for at in steps:
            optimizer.step([torch.arange(3.0) - at])
        return alpha.detach(), {k: v.clone() for k, v in optimizer.state().items()}

    whole, _ = optimized(range(6))
    half, state = optimized(range(3))
    rest, _ = optimized(range(3, 6), state, half)
    assert torch.equal(whole, rest)
