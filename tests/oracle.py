"""The definitions, in float64 loops. Imports nothing of the package under test."""

# ruff: noqa: N803 - C and P are the letters of the formulas
import contextlib
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


VALID = []
"""While statistics are over valid positions only: which are, ``(N, 1, *S)``."""


@contextlib.contextmanager
def masked(valid):
    """Let statistics in the block be over valid positions only."""
    VALID.append(valid)
    try:
        yield
    finally:
        VALID.pop()


def are_valid(x):
    """Which elements have a say in statistics."""
    return VALID[-1].expand_as(x) if VALID else torch.ones_like(x, dtype=torch.bool)


def group_moments(x, ids):
    """Mean and biased variance of each element's group, in the shape of ``x``."""
    mean, var = torch.zeros_like(x), torch.zeros_like(x)
    for group in ids.unique():
        members = ids == group
        values = x[members & are_valid(x)]
        if not values.numel():
            continue  # nothing of such a group is looked at
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
    cells = [x[(ids == index) & are_valid(x)] for index in range(num_values)]
    means = torch.stack([cell.sum() / cell.numel() for cell in cells])
    return means, torch.stack([unbiased(cell) for cell in cells])


def running_moments(x, kind, running, alpha, **options):
    """Mean and variance of each element at evaluation, ``alpha`` parts of them its example's."""
    mean, var = spread_running(x, kind, running, **options)
    if alpha:
        ids = group_ids(kind, x.shape, **(options | own_example(kind)))
        own = torch.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)) * (ids.max() + 1) + ids
        e, v = group_moments(x, own)
        square = alpha * (v + e**2) + (1 - alpha) * (var + mean**2)
        mean = alpha * e + (1 - alpha) * mean
        var = square - mean**2
    return mean, var


def train(kind, x, parameters, eps, buffers=None, **options):
    """Training forward of any layer; ``parameters`` by their names in the layer."""
    if kind in COMPOSITES:
        return COMPOSITES[kind](x, parameters, eps, batch_moments(kind, buffers), **options)
    ids = group_ids(kind, x.shape, **options)
    return normalize(x, ids, parameters.get("weight"), parameters.get("bias"), eps)


def evaluate(kind, x, parameters, eps, running, alpha, **options):
    """Evaluation of any layer with running ``(mean, var)`` and ``alpha`` parts of the own."""
    if kind in COMPOSITES:
        moments = functools.partial(running_moments, kind="bn", running=running, alpha=alpha)
        return COMPOSITES[kind](x, parameters, eps, moments, **options)
    mean, var = running_moments(x, kind, running, alpha, **options)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return affine((x - mean) / (var + eps) ** 0.5, weight, bias)


def follow(kind, x, buffers, parameters, eps, **options):
    """Running mean and variance after a training batch, momentum (or update rate) 0.1."""
    mean, var = buffers
    if kind == "bcn-micro":
        return moved(x, mean, var)
    if kind == "gnplus" and options.get("order", "group-first") == "group-first":
        ids = group_ids("gn", x.shape, num_groups=options["num_groups"])
        x = normalize(x, ids, None, None, eps)
    if kind == "ibn":
        x = x[:, x.shape[1] // 2 :]
    plain = {} if kind in COMPOSITES else options
    new = whole_batch_statistics(x, "bn" if kind in COMPOSITES else kind, **plain)
    return 0.9 * mean + 0.1 * new[0], 0.9 * var + 0.1 * new[1]


def moved(x, mean, var, rate=0.1):
    """Estimates after a micro batch, channel by channel (Qiao et al., Algorithm 1)."""
    means, variances = mean.double().clone(), var.double().clone()
    for c in range(x.shape[1]):
        values = x[:, c][are_valid(x)[:, c]].detach().double()
        old = means[c].clone()
        variances[c] += rate * (((values - old) ** 2).sum() / values.numel() - variances[c])
        means[c] += rate * (values.sum() / values.numel() - old)
    return means, variances


def batch_moments(kind, buffers):
    """What the batch stage of a composite normalises by in training: a function of its input."""
    if kind == "bcn-micro":
        return lambda x: spread_running(x, "bn", moved(x, *buffers))
    return lambda x: group_moments(x, group_ids("bn", x.shape))


def unit(x, moments, eps):
    """Zero mean and unit variance, by these moments of every element."""
    return (x - moments[0]) / (moments[1] + eps) ** 0.5


def group_unit(x, num_groups, eps):
    """GN without affine."""
    return unit(x, group_moments(x, group_ids("gn", x.shape, num_groups=num_groups)), eps)


def gnplus(x, p, eps, moments, num_groups, order="group-first", **_):
    """GN and BN mixed (Gunawan, Yin & Zhang, section 4)."""
    if order == "group-first":
        gn = group_unit(x, num_groups, eps)
        bn = unit(gn, moments(gn), eps)
    else:
        bn = unit(x, moments(x), eps)
        gn = group_unit(x if order == "parallel" else bn, num_groups, eps)
    share = 1 / (1 + torch.exp(-p["mix_logit"]))
    return affine(share * gn + (1 - share) * bn, p.get("weight"), p.get("bias"))


def bcn(x, p, eps, moments, num_groups, channel_affine="group", **_):
    """A batch stage, then a group norm (Qiao et al., section 7)."""
    first = affine(unit(x, moments(x), eps), p.get("batch.weight"), p.get("batch.bias"))
    weight, bias = p.get("channel.weight"), p.get("channel.bias")
    if channel_affine == "group":
        of_channel = [c // (x.shape[1] // num_groups) for c in range(x.shape[1])]
        weight, bias = (None if t is None else t[of_channel] for t in (weight, bias))
    return affine(group_unit(first, num_groups, eps), weight, bias)


def sn(x, p, eps, moments, use_batch=True, **_):
    """Mixed statistics (Luo et al.)."""
    kinds = ("in", "ln")
    sources = [group_moments(x, group_ids(kind, x.shape)) for kind in kinds]
    if use_batch:
        sources.append(moments(x))
    mean, var = torch.zeros_like(x), torch.zeros_like(x)
    for k, source in enumerate(sources):
        mean = mean + torch.exp(p["mean_logits"][k]) / torch.exp(p["mean_logits"]).sum() * source[0]
        var = var + torch.exp(p["var_logits"][k]) / torch.exp(p["var_logits"]).sum() * source[1]
    return affine(unit(x, (mean, var), eps), p.get("weight"), p.get("bias"))


def ibn(x, p, eps, moments, **_):
    """IN on the first half of the channels, BN on the rest (Pan et al.)."""
    half = x.shape[1] // 2
    left, right = x[:, :half], x[:, half:]
    left = unit(left, group_moments(left, group_ids("in", left.shape)), eps)
    right = unit(right, moments(right), eps)
    parts = (
        affine(left, p.get("instance.weight"), p.get("instance.bias")),
        affine(right, p.get("batch.weight"), p.get("batch.bias")),
    )
    return torch.cat(parts, dim=1)


def gw(x, p, eps, moments, num_groups, iterations=5, **_):
    """Whitened groups of channels, example by example, by Newton's iteration (Huang et al.)."""
    results = []
    for example, inside in zip(x, are_valid(x), strict=True):
        rows = example.reshape(num_groups, -1)
        chosen = inside.reshape(num_groups, -1)[0]  # alike in every row
        center = rows[:, chosen].sum(dim=1, keepdim=True) / max(int(chosen.sum()), 1)
        rows = rows - center
        identity = torch.eye(num_groups, dtype=x.dtype)
        kept = rows[:, chosen]
        covariance = kept @ kept.T / max(kept.shape[1], 1) + eps * identity
        trace = covariance.trace()
        root = identity
        for _ in range(iterations):
            root = 1.5 * root - 0.5 * torch.linalg.matrix_power(root, 3) @ (covariance / trace)
        results.append((root / trace**0.5 @ rows).reshape(example.shape))
    return affine(torch.stack(results), p.get("weight"), p.get("bias"))


COMPOSITES = {"gnplus": gnplus, "bcn": bcn, "bcn-micro": bcn, "sn": sn, "ibn": ibn, "gw": gw}


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
