"""Norms at evaluation, written from their definitions in float64 loops."""

import torch


def by_channel(x, mean, var, weight, bias, eps):
    """A scale and a shift of each channel by its running statistics."""
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        y[:, c] = weight[c] * (x[:, c] - mean[c]) / (var[c] + eps) ** 0.5 + bias[c]
    return y


def by_pooled_group(x, mean, var, weight, bias, eps, num_groups):
    """Running statistics of channels, pooled in runs by the law of total variance."""
    size = x.shape[1] // num_groups
    means, variances = torch.empty_like(mean), torch.empty_like(var)
    for g in range(num_groups):
        run = range(g * size, (g + 1) * size)
        m = sum(mean[c] for c in run) / size
        v = sum(var[c] + (mean[c] - m) ** 2 for c in run) / size
        for c in run:
            means[c], variances[c] = m, v
    return by_channel(x, means, variances, weight, bias, eps)


def by_group(x, mean, var, weight, bias, eps):
    """Running statistics of runs of channels."""
    size = x.shape[1] // len(mean)
    of = [c // size for c in range(x.shape[1])]
    return by_channel(x, mean[of], var[of], weight, bias, eps)


def group_norm(x, num_groups, weight, bias, eps):
    """Statistics of each example's runs of channels; a scale and a shift of each run."""
    y = torch.empty_like(x)
    size = x.shape[1] // num_groups
    for n in range(x.shape[0]):
        for g in range(num_groups):
            run = slice(g * size, (g + 1) * size)
            cell = x[n, run]
            var = (cell - cell.mean()).square().mean()
            y[n, run] = weight[g] * (cell - cell.mean()) / (var + eps) ** 0.5 + bias[g]
    return y
