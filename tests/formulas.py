"""Formulas of composites that do what no layer's does: together every step of a program."""

import torch

import normkit as nk
from cases import randn
from normkit.core.algebra import GroupStatistics, per_segment
from normkit.core.composite import Composite, own_groups
from normkit.core.normalize import Affine
from normkit.core.partition import Partition
from normkit.core.stages import normalize_composite


class Everything:
    """Groups over the batch; channels beside each other; shares of a parameter; no gradient."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, table, weight, bias, logits, *given):
        scale, center = self.first(table)
        a, b = torch.softmax(logits.to(scale.dtype), dim=0)
        seen = self.batch(table.transform(scale, center), None, None, *given)
        mixed = torch.lerp(center, seen.center, torch.sigmoid(a)) / 2 - b * table.mean.detach()
        factor = -(scale.square() * a) + 3.0 * seen.scale
        return Affine(factor * per_segment(weight, factor), mixed + per_segment(bias, mixed))

    def batch_input(self, table):
        return table.transform(*self.first(table))

    @staticmethod
    def first(table):
        first, rest = (table.map(lambda t: t[:, s]) for s in (slice(0, 4), slice(4, 12)))  # noqa: B023
        left = own_groups(2, 1e-3)(first, None, None)
        whole = GroupStatistics(partition=Partition(num_groups=2), eps=1e-3)
        right = whole(rest, None, None)
        scale = torch.cat([left.scale, right.scale.expand_as(rest.mean)], dim=1)
        center = torch.cat([left.center, right.center], dim=1)
        return Affine(scale, center)


class Beside:
    """The same of channels by themselves, beside groups of all: what Triton kernels do, too."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, table, weight, bias, logits, *given):
        scale, center = self.first(table)
        a, b = torch.softmax(logits.to(scale.dtype), dim=0)
        moved = table.transform(scale, center)
        seen = self.batch(moved, None, None, *given)
        groups = own_groups(3, 1e-3)(moved, None, None)
        mixed = torch.lerp(groups.center, seen.center, torch.sigmoid(a)) - b * table.mean.detach()
        factor = groups.scale * a + 3.0 * seen.scale
        return Affine(factor * per_segment(weight, factor), mixed + per_segment(bias, mixed))

    def batch_input(self, table):
        return table.transform(*self.first(table))

    @staticmethod
    def first(table):
        left = own_groups(5, 1e-3)(table.map(lambda t: t[:, :5]), None, None)
        whole = GroupStatistics(partition=Partition(num_groups=7), eps=1e-3)
        right = whole(table.map(lambda t: t[:, 5:]), None, None)
        scale = torch.cat([left.scale, right.scale.expand_as(right.center)], dim=1)
        return Affine(scale, torch.cat([left.center, right.center], dim=1))


def constant(batch):
    """A scale and a shift, whatever the map is; the batch's statistics have no say."""

    def formula(table, weight, bias, *given):
        batch(table, None, None, *given)
        return Affine(per_segment(weight, table.mean), per_segment(bias, table.mean))

    return formula


def shared(batch):
    """One mean of all channels and examples, through rows that every example shares."""

    def formula(table, weight, bias, *given):
        rows = batch(table, weight, bias, *given)
        one = GroupStatistics(partition=Partition(num_groups=1), eps=0.1)
        again = one(table.transform(*rows), bias, weight)
        return Affine(rows.scale * again.scale + again.scale, again.center * rows.center)

    return formula


FORMULAS = {
    "everything": (Everything, (12, 12, 2)),
    "beside": (Beside, (12, 12, 2)),
    "constant": (constant, (12, 12)),
    "shared": (shared, (12, 12)),
}


def results(name, x, grad, kernels, training=True):
    formula, sizes = FORMULAS[name]
    parameters = [randn(n, seed=n + i).requires_grad_() for i, n in enumerate(sizes)]
    running = nk.BatchNorm(12).double()
    running.running_mean.copy_(randn(12, seed=5))
    x = x.detach().requires_grad_()
    composite = Composite(formula, (), 1e-2)
    with nk.use_kernels(kernels):
        y = normalize_composite(
            x, composite, running._running(), training, tuple(parameters), None, None
        )
        found = torch.autograd.grad(y, (x, *parameters), grad, materialize_grads=True)
    return [y.detach(), *found, running.running_mean, running.running_var]
