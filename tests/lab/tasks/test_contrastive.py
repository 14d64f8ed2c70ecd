"""Discrepancies of two domains, against loops over single examples."""

import math

import pytest
import torch

from normkit.errors import InputError
from normkit.lab.tasks.contrastive import class_discrepancies, contrastive_discrepancy


def features(seed, m, n, d=5, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, d, dtype=torch.float64, generator=generator) + offset


def distance(u, v):
    return sum((float(a) - float(b)) ** 2 for a, b in zip(u, v, strict=True))


def discrepancy_by_definition(s, t):
    """Of two sets of examples, each pair by itself."""
    both = [*s, *t]
    different = [distance(u, v) for i, u in enumerate(both) for j, v in enumerate(both) if i != j]
    width = sum(different) / len(different)

    def kernel(u, v):
        return sum(math.exp(-distance(u, v) / (2.0**i * width)) for i in (-2, -1, 0, 1, 2))

    def mean(a, b):
        return sum(kernel(u, v) for u in a for v in b) / (len(a) * len(b))

    return mean(s, s) + mean(t, t) - 2 * mean(s, t)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 4, 4), (2, 3, 5), (1, 2, 2)], ids=str)
def test_discrepancies_are_those_of_single_pairs(m, n, k):
    source, target = features(0, m, n), features(1, m, k, offset=0.7)
    found = class_discrepancies(source, target)
    expected = torch.tensor(
        [[discrepancy_by_definition(s, t) for t in target] for s in source], dtype=torch.float64
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_contrastive_discrepancy_is_within_less_between_summed_over_layers():
    layers = [
        (features(0, 3, 4), features(1, 3, 4, offset=0.5)),
        (features(2, 3, 4, d=2), features(3, 3, 4, d=2)),
    ]
    expected = 0.0
    for source, target in layers:
        pairs = [[discrepancy_by_definition(s, t) for t in target] for s in source]
        within = sum(pairs[a][a] for a in range(3)) / 3
        between = sum(pairs[a][b] for a in range(3) for b in range(3) if a != b) / 6
        expected += within - between
    assert float(contrastive_discrepancy(layers)) == pytest.approx(expected, rel=1e-10)


def test_one_class_has_no_other_to_be_far_from():
    source, target = features(0, 1, 3), features(1, 1, 3)
    expected = discrepancy_by_definition(source[0], target[0])
    assert float(contrastive_discrepancy([(source, target)])) == pytest.approx(expected)


def test_equal_domains_have_no_discrepancy_and_equal_features_no_nan():
    source = features(0, 2, 3)
    assert class_discrepancies(source, source).diagonal().abs().max() < 1e-12
    zeros = torch.zeros(2, 3, 4, requires_grad=True)
    contrastive_discrepancy([(zeros, zeros)]).backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_a_step_down_the_gradient_brings_classes_together_and_apart():
    source = features(0, 2, 6)
    target = (source.flip(0) * 0.5 + features(1, 2, 6)).requires_grad_()  # nearer to the other one
    before = contrastive_discrepancy([(source, target)])
    (gradient,) = torch.autograd.grad(before, target)
    after = contrastive_discrepancy([(source, target - 0.5 * gradient)])
    assert after.item() < before.item()


def test_no_gradient_goes_through_the_width():
    source, target = features(0, 2, 3), features(1, 2, 3).requires_grad_()
    found = class_discrepancies(source, target)[0, 0]
    (gradient,) = torch.autograd.grad(found, target)
    both = torch.cat([source[0], target[0].detach()])
    width = sum(distance(u, v) for u in both for v in both) / 30

    def by_fixed_width(t):
        def mean(a, b):
            pairs = ((u - v).square().sum() for u in a for v in b)
            values = [sum(torch.exp(-d / (2.0**i * width)) for i in range(-2, 3)) for d in pairs]
            return torch.stack(values).mean()

        return mean(source[0], source[0]) + mean(t, t) - 2 * mean(source[0], t)

    leaf = target.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_fixed_width(leaf[0]), leaf)
    torch.testing.assert_close(gradient, expected)


def test_classes_that_differ_in_number_are_refused():
    with pytest.raises(InputError, match=r"source features have shape \(2, 3, 5\)"):
        class_discrepancies(features(0, 2, 3), features(1, 3, 3))
