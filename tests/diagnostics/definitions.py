"""What the analyses of weights and channels are, in float64 loops. Imports nothing of normkit."""

import math
from itertools import product

import torch
from torch.nn import functional


def standardised(rows, eps=0.0, unbiased=False, eps_to="variance", scale=True):
    """Filters ``(O, I)`` from centred ones, by the mean of their squares."""
    if not scale:
        return rows
    size = rows.shape[1]
    squares = rows.square().sum(1, keepdim=True) / (size - 1 if unbiased else size)
    return rows / ((squares + eps).sqrt() if eps_to == "variance" else squares.sqrt() + eps)


def centred(rows):
    """Filters without their means."""
    return rows - rows.mean(1, keepdim=True)


def loss_of(rows, model, pair, gain, offset):
    """Loss of conv, batch norm, tanh and linear, whose convolution has these filters."""
    conv, _, _, _, linear = model
    weight = (rows * gain[:, None] + offset[:, None]).view(conv.weight.shape)
    maps = functional.conv2d(pair[0], weight, conv.bias)
    mean = maps.mean((0, 2, 3), keepdim=True)
    var = (maps - mean).square().mean((0, 2, 3), keepdim=True)
    unit = (maps - mean) / (var + 1e-5).sqrt()
    scores = unit.tanh().flatten(1) @ linear.weight.T + linear.bias
    return -scores.log_softmax(1)[range(len(scores)), pair[1]].mean()


ENDS = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))
"""Places and weights of a difference of fourth order."""


def hessian(value, rows, index, step=1e-3):
    """Second derivatives of ``value(rows)`` by one filter, as differences of gradients."""
    size = rows.shape[1]
    found = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for a, w in ENDS:
            moved = rows.clone()
            moved[index, i] += a * step
            moved.requires_grad_()
            (slope,) = torch.autograd.grad(value(moved), moved)
            found[i] += w * slope[index] / step
    return found


@torch.no_grad()
def gradient(value, rows, step=1e-4):
    """Derivatives of ``value(rows)`` by all values of all filters."""
    found = torch.zeros_like(rows)
    for i, j in product(*map(range, rows.shape)):
        for a, w in ENDS:
            moved = rows.clone()
            moved[i, j] += a * step
            found[i, j] += w * value(moved) / step
    return found


def degrees(a, b):
    """Angle between two filters."""
    cosine = float((a * b).sum()) / math.sqrt(float(a.square().sum() * b.square().sum()))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def input_sums(weight, groups=1, transposed=False):
    """Sums of absolute weights by the input channel that they take."""
    weight = weight.detach()
    num_in = weight.shape[0] if transposed else weight.shape[1] * groups
    sums = [0.0] * num_in
    for place in product(*map(range, weight.shape)):
        if transposed:
            channel = place[0]
        else:
            channel = place[0] // (weight.shape[0] // groups) * weight.shape[1] + place[1]
        sums[channel] += abs(float(weight[place]))
    return sums


def propagated(weight, bias, mean, var, groups=1):
    """Means and variances of a convolution's outputs by eq. 37, from those of its inputs."""
    means, variances = [], []
    for o in range(weight.shape[0]):
        m, v = 0.0 if bias is None else float(bias[o]), 0.0
        first = o // (weight.shape[0] // groups) * weight.shape[1]
        for place in product(*map(range, weight.shape[1:])):
            w = float(weight[(o, *place)])
            m += w * float(mean[first + place[0]])
            v += w * w * float(var[first + place[0]])
        means.append(m)
        variances.append(v)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def difference(mean, var):
    """StatDiff of all channels as one group, and the spread of their deviations."""
    std = [math.sqrt(float(v)) for v in var]
    center, size = sum(map(float, mean)) / len(mean), sum(std) / len(std)
    of_means = math.sqrt(sum((float(m) - center) ** 2 for m in mean) / len(mean))
    of_stds = math.sqrt(sum((s - size) ** 2 for s in std) / len(std))
    return of_means / size, of_stds / size
