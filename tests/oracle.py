"""The definitions, in float64 loops. Imports nothing of the package under test."""

# ruff: noqa: N803 - C and P are the letters of the formulas
import functools
import math

import torch


@functools.cache
def group_ids(kind, shape, **options):
    """Statistics group of every element, written from the definition of each method."""
    num_examples, num_channels = shape[:2]
    positions = math.prod(shape[2:])
    ids = torch.empty(num_examples, num_channels, positions, dtype=torch.long)
    rule = RULES[kind]
    for n in range(num_examples):
        for c in range(num_channels):
            for p in range(positions):
                ids[n, c, p] = rule(n, c, p, num_channels, positions, **options)
    return ids.reshape(shape)


RULES = {
    "bn": lambda n, c, p, C, P: c,
    "in": lambda n, c, p, C, P: n * C + c,
    "ln": lambda n, c, p, C, P: n,
    "gn": lambda n, c, p, C, P, num_groups: n * C + c // (C // num_groups),
    "pn": lambda n, c, p, C, P: n * P + p,
    "bgn": lambda n, c, p, C, P, num_groups: (c * P + p) // (C * P // num_groups),
    "ghost": lambda n, c, p, C, P, ghost_batch_size: (n // ghost_batch_size) * C + c,
    "gbgn": lambda n, c, p, C, P, num_groups, examples_per_group=None: (
        (0 if examples_per_group is None else n // examples_per_group) * C + c // (C // num_groups)
    ),
}


def group_moments(x, ids):
    """Mean and biased variance of each element's group, in the shape of ``x``."""
    mean, var = torch.zeros_like(x), torch.zeros_like(x)
    for group in ids.unique():
        members = ids == group
        values = x[members]
        center = values.sum() / values.numel()
        mean = torch.where(members, center, mean)
        var = torch.where(members, ((values - center) ** 2).sum() / values.numel(), var)
    return mean, var


def affine(unit, weight, bias):
    """``weight`` and ``bias`` of each channel, applied after normalising."""
    across = (1, -1, *(1,) * (unit.ndim - 2))
    if weight is not None:
        unit = unit * weight.double().reshape(across)
    return unit if bias is None else unit + bias.double().reshape(across)


def normalize(x, ids, weight, bias, eps):
    """Every element by the mean and variance of its group, then the channel's affine."""
    mean, var = group_moments(x, ids)
    return affine((x - mean) / (var + eps) ** 0.5, weight, bias)


def unbiased(values):
    """Variance with ``n - 1``; zero for a single value."""
    center = values.sum() / values.numel()
    return ((values - center) ** 2).sum() / max(values.numel() - 1, 1)


def whole_batch_statistics(x, kind, **options):
    """What running buffers follow: whole batch, per channel, or per group for BGN."""
    if kind == "bgn":
        ids = group_ids("bgn", x.shape, **options)
        num_values = options["num_groups"]
    else:
        ids, num_values = group_ids("bn", x.shape), x.shape[1]
    cells = [x[ids == index] for index in range(num_values)]
    means = torch.stack([cell.sum() / cell.numel() for cell in cells])
    return means, torch.stack([unbiased(cell) for cell in cells])


def evaluate(x, kind, running, alpha, weight, bias, eps, **options):
    """Evaluation with running ``(mean, var)`` and ``alpha`` parts of the example's own."""
    mean, var = spread_running(x, kind, running, **options)
    if alpha:
        ids = group_ids(kind, x.shape, **(options | own_example(kind)))
        own = torch.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)) * (ids.max() + 1) + ids
        e, v = group_moments(x, own)
        square = alpha * (v + e**2) + (1 - alpha) * (var + mean**2)
        mean = alpha * e + (1 - alpha) * mean
        var = square - mean**2
    return affine((x - mean) / (var + eps) ** 0.5, weight, bias)


def own_example(kind):
    """Options that keep an example's groups to itself, where the kind has runs of examples."""
    return {"ghost": {"ghost_batch_size": 1}, "gbgn": {"examples_per_group": 1}}.get(kind, {})


def spread_running(x, kind, running, **options):
    """Running mean and variance of every element, channel buffers pooled into channel groups."""
    one = x[:1]
    if kind == "bgn":
        ids = group_ids("bgn", one.shape, **options)
        return running[0].double()[ids], running[1].double()[ids]
    groups = group_ids(kind, one.shape, **(options | own_example(kind)))
    channels = group_ids("bn", one.shape)
    mean, var = torch.zeros_like(one), torch.zeros_like(one)
    for group in groups.unique():
        inside = channels[groups == group].unique()
        m, v = running[0].double()[inside], running[1].double()[inside]
        center = m.sum() / len(m)
        mean[groups == group] = center
        var[groups == group] = v.sum() / len(v) + ((m - center) ** 2).sum() / len(m)
    return mean, var
