"""The effect of rounding on a result: the definitions in an arithmetic with deliberate errors.

Every operation of the oracle gets an error as large as an implementation of tables may make: half
a unit in the last place of each result, and for a sum of ``n`` terms ``sqrt(n)`` units of the sum
of their magnitudes (Higham & Mary 2019, A New Approach to Probabilistic Rounding Error Analysis).
The signs are random. The differences between several such results are the allowed error. So an
offset, a tiny variance or a distant channel enlarge it as they must, without a guessed tolerance.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

import oracle

TABLE = torch.finfo(torch.float64).eps  # unit of values that the C++ kernels keep in float64
NEARBY = 8  # values whose mean the C++ kernels subtract before they sum; one may be an outlier


class Recorded(oracle.Exact):
    """Exact arithmetic that records all statistics in the order in which they are computed."""

    def __init__(self):
        self.means = []

    def mean(self, values, ids):
        self.means.append(super().mean(values, ids))
        return self.means[-1]


class Given(oracle.Exact):
    """Exact arithmetic with recorded statistics, through which no gradient flows."""

    def __init__(self, recorded):
        self.means = iter(recorded.means)

    def mean(self, values, ids):
        return next(self.means).detach()


class Rounding(oracle.Exact):
    """Arithmetic with errors of ``unit``, the distance from 1 to the next number, and random signs.

    With ``recorded``, the error is added to the exact statistic and not to one that earlier errors
    have changed: a fused kernel computes the second stage's statistics from the first stage's
    table, so the errors of two stages need not cancel, as they do if each stage reads the map.

    Args:
        unit: Unit of the dtype of the computation.
        around_the_mean: Sums are taken of distances from a mean of a few values, in float64, as
            the C++ kernels do, so that an offset costs nothing.
        recorded: The exact statistics, or None to compute them from the values.
        seed: Seed of the signs.
    """

    def __init__(self, unit, around_the_mean, recorded, seed):
        self.unit, self.around_the_mean = unit, around_the_mean
        self.means = None if recorded is None else iter(recorded.means)
        self.generator = torch.Generator().manual_seed(seed)

    def signs(self, shape):
        """Random signs, 1 or -1 with equal probability."""
        return torch.randint(0, 2, shape, generator=self.generator, dtype=torch.float64) * 2 - 1

    def magnitude(self, x, center, ids):
        """Magnitude of the terms that are summed for a mean of ``x``."""
        x = x.detach()
        if self.around_the_mean:
            apart = (x - center.detach()).abs()
            return apart + farthest(apart, ids) / NEARBY + x.abs() * (TABLE / self.unit)
        return x.abs()

    def mean(self, values, ids):
        exact = self.exact_mean(values, ids)
        return _Mean.apply(values, ids, self.magnitude(values, exact, ids), exact, self)

    def exact_mean(self, values, ids):
        """Of the values, or as it was recorded."""
        own = super().mean(values.detach(), ids)
        return own if self.means is None else next(self.means).detach()

    def mean_square(self, x, center, ids):
        distance = x - center
        apart = distance.detach().abs()
        sizes = 2 * apart * self.magnitude(x, center, ids) + apart**2
        square = distance**2
        return _Mean.apply(square, ids, sizes, self.exact_mean(square, ids), self)

    def spread(self, values, ids):
        return _Spread.apply(values, ids, self)

    def rounded(self, values):
        return _Rounded.apply(values, self)

    def kept(self, values):
        unit = TABLE if self.around_the_mean else self.unit
        return values * (1 + unit * self.signs(values.shape))

    def used(self, values):
        return _Used.apply(values, self)

    def error_of_means(self, sizes, ids):
        """Error of the mean of each element's group, for terms of these magnitudes."""
        inside = oracle.are_valid(sizes)
        where = ids[inside]
        counts = torch.bincount(where, minlength=int(ids.max()) + 1).clamp(min=1)
        sums = torch.zeros(len(counts), dtype=sizes.dtype).index_add(0, where, sizes[inside])
        return (self.error_of_sums(sums, counts) / counts)[ids]

    def error_of_segments(self, x):
        """Error of the mean of each example's channels, which a kernel subtracts.

        In float64 also the error of their deviations, because a running mean is rounded too.
        """
        x, ids, exact = x.double(), oracle.group_ids("in", x.shape), oracle.Exact()
        apart = x - exact.mean(x, ids)
        shift = self.error_of_means(self.magnitude(x, x - apart, ids), ids)
        if self.unit > TABLE:
            return shift
        deviation = exact.mean(apart**2, ids).sqrt().clamp(min=1e-300)
        return shift + apart * self.error_of_means(x.abs(), ids) / deviation

    def error_of_sums(self, sums, counts):
        """Error of sums of ``counts`` terms, for these sums of magnitudes."""
        growth = counts.clamp(min=16).sqrt()  # a few operations on tables follow every sum
        return self.signs(sums.shape) * self.unit * growth * sums


def farthest(apart, ids):
    """The largest finite distance in each element's group, over valid positions."""
    known = oracle.are_valid(apart) & apart.isfinite()
    largest = torch.zeros(int(ids.max()) + 1, dtype=apart.dtype)
    return largest.scatter_reduce_(0, ids[known], apart[known], "amax")[ids]


class _Mean(Function):
    """The mean of each group; the operation is its own transpose."""

    @staticmethod
    def forward(ctx, values, ids, sizes, exact, rounding):
        ctx.ids, ctx.rounding = ids, rounding
        return exact + rounding.error_of_means(sizes, ids)

    @staticmethod
    def backward(ctx, grad):
        exact = oracle.Exact.mean(ctx.rounding, grad, ctx.ids)
        return exact + ctx.rounding.error_of_means(grad.abs(), ctx.ids), None, None, None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx, values, ids, rounding):
        ctx.size, ctx.ids, ctx.rounding = values.shape, ids, rounding
        return values[ids]

    @staticmethod
    def backward(ctx, grad):
        where, flat = ctx.ids.flatten(), grad.flatten()
        counts = torch.bincount(where, minlength=ctx.size[0])
        none = torch.zeros(ctx.size, dtype=grad.dtype)
        sums, sizes = (none.index_add(0, where, t) for t in (flat, flat.abs()))
        return sums + ctx.rounding.error_of_sums(sizes, counts), None, None


class _Rounded(Function):
    @staticmethod
    def forward(ctx, values, rounding):
        ctx.rounding = rounding
        return values * (1 + rounding.unit * rounding.signs(values.shape))

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + ctx.rounding.unit * ctx.rounding.signs(grad.shape)), None


class _Used(Function):
    @staticmethod
    def forward(ctx, values, rounding):
        ctx.rounding = rounding
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + ctx.rounding.unit * ctx.rounding.signs(grad.shape)), None
