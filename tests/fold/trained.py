"""Models whose norms have seen something."""

import torch
from torch import nn

BUFFERS = ("running_mean", "running_var")


@torch.no_grad()
def trained(model, seed=0):
    """Give all norms statistics, scales and shifts that change every output; in evaluation mode."""
    source = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            for name, low, high in (*zip(BUFFERS, (-1, 0.5), (1, 2), strict=True),):
                draw_(getattr(module, name), low, high, source)
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -1, 1)):
                value = getattr(module, name)
                if value is not None:
                    draw_(value, low, high, source)
    return model.eval()


def draw_(values, low, high, source):
    values.copy_(torch.rand(values.shape, generator=source) * (high - low) + low)


def model_of(*layers, seed=0):
    """A trained chain in float64."""
    torch.manual_seed(seed)
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return trained(nn.Sequential(*layers).double())


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
