"""Inputs laid out in memory, and a layer's numbers in float64 to compare with the oracle."""

import torch

from cases import statistics


def arrange(x, layout):
    """Lay the same values out differently in memory."""
    if layout == "channels_last":
        axes = (0, *range(2, x.ndim), 1)
        back = (0, x.ndim - 1, *range(1, x.ndim - 1))
        return x.permute(axes).contiguous().permute(back)
    if layout == "sliced":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    return x


def in_float64(layer):
    """Parameters by name, as leaves of their own."""
    return {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}


def buffers_of(case, layer):
    """Running mean and variance as they are now, in float64."""
    if not case.tracks:
        return None
    holder = statistics(layer)
    return tuple(t.detach().double().clone() for t in (holder.running_mean, holder.running_var))


def gradients(y, x, layer, grad):
    """Gradients of x and every parameter."""
    return torch.autograd.grad(y, (x, *layer.parameters()), grad)


def scaled(tolerance, like):
    """Let an error be small beside the largest value: sums over a map grow with it."""
    largest = max(1.0, like.abs().max().item())
    return {"atol": tolerance["atol"] * largest, "rtol": tolerance["rtol"]}


def parameters_for(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32
