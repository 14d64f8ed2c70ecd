"""The pooled operator written from its definition, group by group, in float64; nothing of ours."""

import torch
from torch import Tensor


def normalize(x, weight, bias, num_groups, examples_per_group, eps=1e-5):
    """``(y, mean, var)``; differentiable, so that autograd gives the gradient's definition."""
    size = examples_per_group or max(x.shape[0], 1)
    results, means, variances = [], [], []
    for examples in x.contiguous().split(size):
        values = examples.reshape(examples.shape[0], num_groups, -1)
        mean = values.mean((0, 2), keepdim=True)
        var = (values - mean).square().mean((0, 2), keepdim=True)
        results.append(((values - mean) / (var + eps).sqrt()).reshape(examples.shape))
        means.append(mean.flatten())
        variances.append(var.flatten())
    return affine(torch.cat(results), weight, bias), torch.cat(means), torch.cat(variances)


def affine(y, weight, bias):
    """``y`` scaled and shifted channel by channel."""
    shape = (1, -1) + (1,) * (y.ndim - 2)
    if weight is not None:
        y = y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def channels_last(x: Tensor) -> Tensor:
    """The same map with channels side by side in memory, at any rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
