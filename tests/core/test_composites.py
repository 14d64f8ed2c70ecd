"""What composites promise beyond their definition: Algorithm 1, learning rates, whiteness."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from cases import randn
from normkit.core import algebra, composite


def test_a_micro_batch_stage_is_algorithm_1_over_ten_steps():
    layer, whole = (
        nk.BatchChannelNorm(6, num_groups=1, micro_batch=True, update_rate=0.2).double()
        for _ in range(2)
    )
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    outputs = []
    layer.batch.register_forward_hook(lambda m, given, y: outputs.append(y))
    for step in range(10):
        x = randn(2, 6, 3, 3, seed=step, mean=step, std=2.0)
        layer(x)
        batch_mean = x.mean(dim=(0, 2, 3))
        batch_var = (x - mean.reshape(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))
        mean, var = mean + 0.2 * (batch_mean - mean), var + 0.2 * (batch_var - var)
        scale = (var + 1e-5).rsqrt().reshape(1, -1, 1, 1)
        first = (x - mean.reshape(1, -1, 1, 1)) * scale
        assert_close(outputs[-1], first)
        assert_close(whole(x), nn.functional.group_norm(first, 1))  # the stages at once
    for batch in (layer.batch, whole.batch):
        assert_close(batch.running_mean, mean)
        assert_close(batch.running_var, var)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_finds_the_estimates_of_its_own_forward(reentrant, hooked, kernels):
    def gradients(run):
        layer = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True, update_rate=0.5).double()
        if hooked:
            layer.batch.register_forward_hook(lambda *_: None)
        inputs = [randn(2, 6, 4, seed=seed, mean=seed).requires_grad_() for seed in range(3)]
        sum(run(lambda x: layer(torch.tanh(layer(x))), x).pow(3).sum() for x in inputs).backward()
        return [t.grad for t in (*inputs, *layer.parameters())], list(layer.buffers())

    with nk.use_kernels(kernels):
        expected = gradients(lambda f, x: f(x))
        found = gradients(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert_close(found, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_a_checkpoint_looks_again_at_a_batch_that_is_not_finite(kernels, hooked, bad):
    def gradients(run):
        layer = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True, update_rate=0.5).double()
        if hooked:
            layer.batch.register_forward_hook(lambda *_: None)
        batches = [randn(2, 6, 4, seed=seed) for seed in range(2)]
        batches[0][1, 5, 0] = bad
        inputs = [batch.requires_grad_() for batch in batches]
        sum(run(layer, x).pow(3).sum() for x in inputs).backward()
        return [x.grad for x in inputs]

    with nk.use_kernels(kernels):
        expected = gradients(lambda f, x: f(x))
        found = gradients(lambda f, x: checkpoint(f, x, use_reentrant=False))
    assert_close(found, expected, equal_nan=True)
    assert found[0][:, :4].isfinite().all()  # the groups without it


def test_a_second_look_at_something_else_is_refused():
    layer = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True)
    seen = iter([randn(2, 6, 4, dtype=torch.float32), randn(2, 6, 4, seed=1, dtype=torch.float32)])
    x = randn(2, 6, 4, dtype=torch.float32).requires_grad_()
    y = checkpoint(lambda x: layer(x + next(seen)), x, use_reentrant=True)
    with pytest.raises(nk.InputError, match="none of its last 8 training forwards has seen"):
        y.sum().backward()


def test_copies_of_a_micro_batch_layer_keep_no_account_of_batches():
    layer = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True)
    layer(randn(2, 6, 4, dtype=torch.float32))
    assert len(layer.batch._recent) == 1
    assert len(copy.deepcopy(layer).batch._recent) == 0


def test_options_reach_the_batch_stage():
    layer = nk.BatchChannelNorm(6, num_groups=3)
    layer.momentum = 0.5
    assert (layer.batch.momentum, layer.momentum) == (0.5, 0.5)
    micro = nk.BatchChannelNorm(6, num_groups=3, micro_batch=True)
    micro.batch.update_rate = 0.7
    assert micro.update_rate == 0.7


@pytest.mark.parametrize("make", [lambda: nk.BatchChannelNorm(8, num_groups=4),
                                  lambda: nk.InstanceBatchNorm(8)])  # fmt: skip
def test_a_stage_at_evaluation_needs_no_variance_and_one_in_training_does(make):
    layer = make()
    layer.batch.eval()
    for part in layer.children():
        if part is not layer.batch:
            part.eval()
    layer(torch.randn(1, 8, 1, 1))  # running statistics and an example's own: nothing to learn
    layer.eval()
    layer.batch.train()
    with pytest.raises(nk.PartitionError, match="more than 1 value"):
        layer(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("micro", [False, True])
def test_stages_one_by_one_are_the_composite_at_once(micro):
    layers = [nk.BatchChannelNorm(6, num_groups=3, micro_batch=micro).double() for _ in range(2)]
    layers[1].batch.register_forward_hook(lambda *_: None)
    for step in range(3):
        x = randn(4, 6, 5, seed=step, mean=1.0)
        assert_close(layers[0](x), layers[1](x))
    for name, value in layers[0].state_dict().items():
        assert_close(layers[1].state_dict()[name], value)


def test_halves_one_by_one_are_the_composite_at_once():
    layers = [nk.InstanceBatchNorm(7).double() for _ in range(2)]
    layers[1].instance.register_forward_hook(lambda *_: None)
    x = randn(4, 7, 5, mean=1.0)
    assert_close(layers[0](x), layers[1](x))
    assert layers[0].instance.num_features == 3


def test_update_rates_follow_the_learning_rate_of_their_group():
    slow, fast = (nk.BatchChannelNorm(6, num_groups=3, micro_batch=True) for _ in range(2))
    groups = [{"params": slow.parameters(), "lr": 0.01}, {"params": fast.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    nk.sync_update_rates(nn.Sequential(slow, fast, nk.BatchNorm(6)), optimizer)
    assert (slow.update_rate, fast.batch.update_rate) == (0.01, 0.5)
    optimizer.param_groups[1]["lr"] = 2.0
    optimizer.param_groups[0]["lr"] = 0.02
    with pytest.raises(nk.OptionError, match=r"update_rate=2.0 .* lies in \(0, 1\]"):
        nk.sync_update_rates(nn.Sequential(slow, fast), optimizer)
    assert slow.update_rate == 0.01


def test_a_switchable_norm_that_has_chosen_batch_norm_is_batch_norm():
    layer, plain = nk.SwitchableNorm(6).double(), nk.BatchNorm(6).double()
    with torch.no_grad():
        for logits in (layer.mean_logits, layer.var_logits):
            logits.copy_(torch.tensor([-200.0, -200.0, 200.0]))
    x = randn(4, 6, 5, 7)
    assert_close(layer(x), plain(x))
    assert_close(layer.eval()(x), plain.eval()(x))


def test_whitening_agrees_with_an_eigendecomposition():
    x = randn(2, 16, 9, 9, mean=3.0)
    y = nk.functional.group_whitening(x, 4, iterations=15)
    for example, found in zip(x, y, strict=True):
        rows = example.reshape(4, -1)
        rows = rows - rows.mean(dim=1, keepdim=True)
        values, vectors = torch.linalg.eigh(rows @ rows.T / rows.shape[1] + 1e-5 * torch.eye(4))
        expected = vectors @ torch.diag(values.rsqrt()) @ vectors.T @ rows
        assert_close(found.reshape(4, -1), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_groups", [4, 64])
def test_more_steps_than_needed_leave_the_rows_white(num_groups):
    x = randn(1, num_groups, 32, 32, dtype=torch.float32)
    x += randn(1, 1, 32, 32, seed=1, dtype=torch.float32)  # which correlates them
    y = nk.functional.group_whitening(x, num_groups, iterations=20)
    rows = y.reshape(num_groups, -1)
    assert_close(rows @ rows.T / rows.shape[1], torch.eye(num_groups), atol=1e-3, rtol=0)


def test_whitening_a_constant_is_finite():
    assert torch.equal(
        nk.GroupWhitening(6, num_groups=3)(torch.ones(2, 6, 4)), torch.zeros(2, 6, 4)
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nk.GroupNormPlus(6, num_groups=3, order="both"), "order='both' .* group-first"),
        (lambda: nk.GroupNormPlus(6, num_groups=3, mix_rate=2), "mix_rate=2 .* from 0 to 1"),
        (lambda: nk.GroupNormPlus(6, num_groups=3, mix_rate=None), "mix_rate=None .* a share"),
        (lambda: nk.BatchNorm(6, eps="x"), "eps='x' was given"),
        (lambda: nk.BatchChannelNorm(6, num_groups=3, update_rate=0), r"lies in \(0, 1\]"),
        (
            lambda: nk.BatchChannelNorm(6, num_groups=3, channel_affine="x"),
            "one of: group, channel",
        ),
        (lambda: nk.InstanceBatchNorm(6, ratio=0.1), "leaves one of the norms without a channel"),
        (lambda: nk.GroupNormPlus(6, num_groups=4), "4 groups do not divide"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, text):
    with pytest.raises(nk.NormError, match=text):
        make()


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_mix_rate_slows_the_mixture_alone(rate):
    paced, free = (nk.GroupNormPlus(6, num_groups=3, mix_rate=r).double() for r in (rate, 1.0))
    for layer in (paced, free):
        layer(randn(4, 6, 5)).pow(3).sum().backward()
    assert_close(paced.mix_logit.grad, rate * free.mix_logit.grad)
    assert_close(paced.weight.grad, free.weight.grad)


@pytest.mark.parametrize("rule", [
    algebra.GroupStatistics, algebra.WeighedStatistics, algebra.EstimatedStatistics,
    algebra.SynchronizedStatistics, algebra.SynchronizedRuns, composite.BatchThenGroup,
    composite.GroupAndBatch, composite.SwitchedStatistics, composite.InstanceBesideBatch,
])  # fmt: skip
def test_a_rule_can_be_hashed_before_it_has_fields(rule):
    """``torch.compile`` of torch 2.11 does so to each object that is called."""
    assert isinstance(hash(object.__new__(rule)), int)
