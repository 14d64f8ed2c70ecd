"""Batch norm with an example weight of every example, from its definition, in float64 loops."""

import math

import torch


def weighed_batch_norm(x, alphas, norm):
    """``(N, C, H, W)``; ``norm`` has ``mean``, ``var``, ``weight``, ``bias`` and ``eps``."""
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[n, c].flatten().tolist()
            alpha, running_mean, running_var = alphas[n], norm["mean"][c], norm["var"][c]
            own = sum(values) / len(values)
            own_square = sum(v * v for v in values) / len(values)
            mean = alpha * own + (1 - alpha) * running_mean
            square = alpha * own_square + (1 - alpha) * (running_var + running_mean**2)
            std = math.sqrt(square - mean**2 + norm["eps"])
            y[n, c] = (x[n, c] - mean) / std * norm["weight"][c] + norm["bias"][c]
    return y
