"""The definitions, in float64. Imports nothing of the package under test."""

# ruff: noqa: N803 - C and P are the letters of the formulas
import contextlib
import functools
import math

import torch


class Exact:
    """How the definitions add up and multiply: as float64 does.

    A subclass that errs on purpose shows how far rounding can move a result (``arithmetic``).
    """

    def mean(self, values, ids):
        """Mean of each group, at every element of the group."""
        rough = _mean(values, ids)
        rest = _mean(values - rough, ids)  # what rounding has left out
        return torch.where(rest.isfinite(), rough + rest, rough)

    def mean_square(self, x, center, ids):
        """Mean of ``(x - center)^2`` in each group, at every element of the group."""
        return self.mean((x - center) ** 2, ids)

    def spread(self, values, ids):
        """One value a group, at every element of the group."""
        return values[ids]

    def rounded(self, values):
        """The result of one operation on every element."""
        return values

    def kept(self, values):
        """The result of one operation on a table of statistics."""
        return values

    def used(self, values):
        """What enters one of several operations, which have a share each of its gradient."""
        return values


def _mean(values, ids):
    inside = are_valid(values).flatten()
    where, flat = ids.flatten()[inside], values.flatten()[inside]
    counts = torch.bincount(where, minlength=int(ids.max()) + 1 if ids.numel() else 0)
    sums = torch.zeros(len(counts), dtype=values.dtype).index_add(0, where, flat)
    return (sums / counts.clamp(min=1))[ids]


_arithmetic = Exact()


@contextlib.contextmanager
def arithmetic(other):
    """Let the definitions add up and multiply in another way, for a while."""
    global _arithmetic  # noqa: PLW0603
    before, _arithmetic = _arithmetic, other
    try:
        yield
    finally:
        _arithmetic = before


@functools.lru_cache(maxsize=256)
def group_ids(kind, shape, **options):
    """Statistics group of every element, written from the definition of each method."""
    num_examples, num_channels = shape[:2]
    positions = math.prod(shape[2:])
    places = [torch.arange(size) for size in (num_examples, num_channels, positions)]
    n, c, p = torch.meshgrid(*places, indexing="ij")
    return RULES[kind](n, c, p, num_channels, positions, **options).reshape(shape)


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
    """Which elements count in statistics; all of them if the tensor is not a map."""
    if VALID and x.ndim == VALID[-1].ndim:
        return VALID[-1].expand_as(x)
    return torch.ones_like(x, dtype=torch.bool)


def group_moments(x, ids):
    """Mean and biased variance of each element's group, in the shape of ``x``."""
    mean = _arithmetic.mean(x, ids)
    return mean, _arithmetic.mean_square(x, mean, ids)


def affine(unit, weight, bias):
    """``weight`` and ``bias`` of each channel, applied after normalising."""
    channels = group_ids("bn", unit.shape)
    if weight is not None:
        unit = _arithmetic.rounded(unit * _arithmetic.spread(weight.double(), channels))
    if bias is None:
        return unit
    return _arithmetic.rounded(unit + _arithmetic.spread(bias.double(), channels))


def normalize(x, ids, weight, bias, eps):
    """Every element by the mean and variance of its group, then the channel's affine."""
    return affine(unit(x, group_moments(x, ids), eps), weight, bias)


def table(values, ids):
    """One value for each group, of values that are the same in the whole of it."""
    return torch.zeros(int(ids.max()) + 1, dtype=values.dtype).scatter(
        0, ids.flatten(), values.flatten()
    )


def whole_batch_statistics(x, kind, **options):
    """What running buffers follow: whole batch, per channel, or per group for BGN; unbiased."""
    ids = group_ids("bgn", x.shape, **options) if kind == "bgn" else group_ids("bn", x.shape)
    mean, var = (table(t, ids) for t in group_moments(x, ids))
    counts = torch.bincount(ids[are_valid(x)], minlength=len(mean))
    return mean, var * counts / (counts - 1).clamp(min=1)


def running_moments(x, kind, running, alpha, **options):
    """Mean and variance of each element at evaluation, ``alpha`` parts of them its example's."""
    if alpha == 0:
        return spread_running(x, kind, running, **options)
    ids = group_ids(kind, x.shape, **(options | own_example(kind)))
    own = torch.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)) * (ids.max() + 1) + ids
    own_mean, own_var = group_moments(x, own)
    if alpha == 1:
        return own_mean, own_var
    mean, var = spread_running(x, kind, running, **options)
    center = _arithmetic.kept(alpha * own_mean + (1 - alpha) * mean)
    own_part = own_var + (own_mean - center) ** 2
    return center, alpha * own_part + (1 - alpha) * (var + (mean - center) ** 2)


def train(kind, x, parameters, eps, buffers=None, rate=0.1, **options):
    """Training forward of any layer; ``parameters`` by their names in the layer."""
    if kind in COMPOSITES:
        moments = batch_moments(kind, buffers, rate)
        return COMPOSITES[kind](x, parameters, eps, moments, **options)
    ids = group_ids(kind, x.shape, **options)
    return normalize(x, ids, parameters.get("weight"), parameters.get("bias"), eps)


def evaluate(kind, x, parameters, eps, running, alpha, **options):
    """Evaluation of any layer with running ``(mean, var)`` and ``alpha`` parts of the own."""
    if kind in COMPOSITES:
        moments = functools.partial(running_moments, kind="bn", running=running, alpha=alpha)
        return COMPOSITES[kind](x, parameters, eps, moments, **options)
    moments = running_moments(x, kind, running, alpha, **options)
    return affine(unit(x, moments, eps), parameters.get("weight"), parameters.get("bias"))


def follow(kind, x, buffers, parameters, eps, rate=0.1, **options):
    """Running mean and variance after a training batch; ``rate`` is the momentum."""
    mean, var = (t.double() for t in buffers)
    if kind == "bcn-micro":
        return moved(x, mean, var, rate)
    if kind == "gnplus" and options.get("order", "group-first") == "group-first":
        ids = group_ids("gn", x.shape, num_groups=options["num_groups"])
        x = normalize(x, ids, None, None, eps)
    if kind == "ibn":
        x = x[:, x.shape[1] // 2 :]
    plain = {} if kind in COMPOSITES else options
    new = whole_batch_statistics(x, "bn" if kind in COMPOSITES else kind, **plain)
    return (1 - rate) * mean + rate * new[0], (1 - rate) * var + rate * new[1]


def moved(x, mean, var, rate):
    """Estimates after a micro batch, channel by channel (Qiao et al., Algorithm 1)."""
    x, mean, var, ids = x.detach(), mean.double(), var.double(), group_ids("bn", x.shape)
    seen = table(_arithmetic.mean(x, ids), ids)
    square = table(_arithmetic.mean_square(x, mean[ids], ids), ids)
    steps = (_arithmetic.kept(seen - mean), _arithmetic.kept(square - var))
    return _arithmetic.kept(mean + rate * steps[0]), _arithmetic.kept(var + rate * steps[1])


def batch_moments(kind, buffers, rate):
    """What the batch stage of a composite normalises by in training: a function of its input."""
    if kind == "bcn-micro":
        return lambda x: spread_running(x, "bn", moved(x, *buffers, rate))
    return lambda x: group_moments(x, group_ids("bn", x.shape))


def unit(x, moments, eps):
    """Zero mean and unit variance, by these moments of every element."""
    distance = _arithmetic.rounded(_arithmetic.used(x) - moments[0])
    return _arithmetic.rounded(distance / (moments[1] + eps) ** 0.5)


def group_unit(x, num_groups, eps):
    """GN without affine."""
    return unit(x, group_moments(x, group_ids("gn", x.shape, num_groups=num_groups)), eps)


def everywhere(value, x):
    """One value of a layer at every element."""
    return _arithmetic.spread(value.reshape(1), torch.zeros(x.shape, dtype=torch.long))


def gnplus(x, p, eps, moments, num_groups, order="group-first", **_):
    """GN and BN mixed (Gunawan, Yin & Zhang, section 4)."""
    if order == "group-first":
        gn = group_unit(x, num_groups, eps)
        bn = unit(gn, moments(gn), eps)
    else:
        bn = unit(x, moments(x), eps)
        gn = group_unit(x if order == "parallel" else bn, num_groups, eps)
    share = everywhere(1 / (1 + torch.exp(-p["mix_logit"])), x)
    mixed = _arithmetic.rounded(share * gn) + _arithmetic.rounded((1 - share) * bn)
    return affine(mixed, p.get("weight"), p.get("bias"))


def bcn(x, p, eps, moments, num_groups, channel_affine="group", **_):
    """A batch stage, then a group norm (Qiao et al., section 7)."""
    first = affine(unit(x, moments(x), eps), p.get("batch.weight"), p.get("batch.bias"))
    scale, shift = p.get("channel.weight"), p.get("channel.bias")
    if channel_affine == "group":
        of_channel = [c // (x.shape[1] // num_groups) for c in range(x.shape[1])]
        scale, shift = (None if t is None else t[of_channel] for t in (scale, shift))
    return affine(group_unit(first, num_groups, eps), scale, shift)


def sn(x, p, eps, moments, use_batch=True, **_):
    """Mixed statistics (Luo et al.)."""
    kinds = ("in", "ln")
    sources = [group_moments(x, group_ids(kind, x.shape)) for kind in kinds]
    if use_batch:
        sources.append(moments(x))
    shares = [torch.exp(p[n]) / torch.exp(p[n]).sum() for n in ("mean_logits", "var_logits")]
    mean, var = torch.zeros_like(x), torch.zeros_like(x)
    for k, source in enumerate(sources):
        mean = mean + _arithmetic.kept(everywhere(shares[0][k], x) * source[0])
        var = var + _arithmetic.kept(everywhere(shares[1][k], x) * source[1])
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
    center = _arithmetic.mean(x, group_ids("gn", x.shape, num_groups=num_groups))
    centred = _arithmetic.rounded(_arithmetic.used(x) - center)
    results = []
    for example, inside in zip(centred, are_valid(x), strict=True):
        rows = example.reshape(num_groups, -1)
        chosen = rows[:, inside.reshape(num_groups, -1)[0]]  # alike in every row
        identity = torch.eye(num_groups, dtype=x.dtype)
        products = chosen @ chosen.T / max(chosen.shape[1], 1)
        covariance = _arithmetic.rounded(products) + eps * identity
        trace = covariance.trace()
        root = identity
        for _ in range(iterations):
            step = torch.linalg.matrix_power(root, 3) @ (covariance / trace)
            root = _arithmetic.rounded(1.5 * root - 0.5 * step)
        whitened = _arithmetic.rounded(root / trace**0.5 @ rows)
        results.append(whitened.reshape(example.shape))
    return affine(torch.stack(results), p.get("weight"), p.get("bias"))


COMPOSITES = {"gnplus": gnplus, "bcn": bcn, "bcn-micro": bcn, "sn": sn, "ibn": ibn, "gw": gw}


ACTIVATIONS = {
    None: lambda u: u,
    "relu": lambda u: torch.where(u > 0, u, 0.0 * u.detach()),
    "silu": lambda u: u / (1 + torch.exp(-u)),
    "gelu": lambda u: u * (1 + torch.erf(u / 2**0.5)) / 2,
    "hardswish": lambda u: u * torch.clamp(u + 3, 0, 6) / 6,
    "relu6": lambda u: torch.where((u > 0) & (u < 6), u, torch.where(u > 0, 6.0, 0.0)),
    "sigmoid": lambda u: 1 / (1 + torch.exp(-u)),
    "tanh": lambda u: 1 - 2 / (torch.exp(2 * u.clamp(max=300)) + 1),
}


def ended(u, activation, slope, residual=None):
    """What follows a norm: a sum with ``residual``, then an activation by its definition."""
    u = u if residual is None else u + residual
    if activation == "leaky_relu":
        return torch.where(u > 0, u, slope * u)
    return ACTIVATIONS[activation](u)


def own_example(kind):
    """Options that keep an example's groups to itself, where the kind has runs of examples."""
    return {"ghost": {"ghost_batch_size": 1}, "gbgn": {"examples_per_group": 1}}.get(kind, {})


def spread_running(x, kind, running, **options):
    """Running mean and variance of every element, channel buffers pooled into channel groups."""
    one, (mean, var) = x[:1], (t.double() for t in running)
    if kind == "bgn":
        ids = group_ids("bgn", one.shape, **options)
        return mean[ids], var[ids]
    groups = group_ids(kind, one.shape, **(options | own_example(kind)))
    of_channel, channels = groups.reshape(x.shape[1], -1)[:, 0], group_ids("bn", one.shape)
    if len(of_channel.unique()) == x.shape[1]:
        return mean[channels], var[channels]
    center = _arithmetic.mean(mean, of_channel)
    spread = _arithmetic.mean(var, of_channel) + _arithmetic.mean_square(mean, center, of_channel)
    return center[channels], spread[channels]
