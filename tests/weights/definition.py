"""The reparametrisations in plain Python on float64. Imports nothing of the package under test."""

import math

import torch


def filters(weight, channel_axis=0, groups=1):
    """Lists of index tuples, one a filter, in the order of the output channels."""
    if channel_axis == 0:
        return [_indices(weight.shape[1:], (o,)) for o in range(weight.shape[0])]
    per_group = weight.shape[0] // groups
    found = []
    for group in range(groups):
        for o in range(weight.shape[1]):
            rows = range(group * per_group, (group + 1) * per_group)
            found.append([index for i in rows for index in _indices(weight.shape[2:], (i, o))])
    return found


def _indices(shape, before):
    found = [before]
    for size in shape:
        found = [(*index, i) for index in found for i in range(size)]
    return found


def by_filter(weight, rule, **layout):
    """``rule(list of values, number of the filter)`` applied to every filter."""
    made = torch.empty_like(weight, dtype=torch.float64)
    for number, indices in enumerate(filters(weight, **layout)):
        values = rule([weight[index].item() for index in indices], number)
        for index, value in zip(indices, values, strict=True):
            made[index] = value
    return made


def standardized(
    weight, eps=1e-5, unbiased=False, eps_to="variance", center=True, scale=True, **layout
):
    def rule(values, _):
        mean = math.fsum(values) / len(values)
        var = math.fsum((v - mean) ** 2 for v in values) / (len(values) - unbiased)
        under = math.sqrt(var + eps) if eps_to == "variance" else math.sqrt(var) + eps
        return [(v - mean * center) / (under if scale else 1) for v in values]

    return by_filter(weight, rule, **layout)


def unit_length(weight, gain, center=False, **layout):
    def rule(values, number):
        mean = math.fsum(values) / len(values) if center else 0
        length = math.sqrt(math.fsum((v - mean) ** 2 for v in values))
        return [gain[number].item() * (v - mean) / length for v in values]

    return by_filter(weight, rule, **layout)
