"""What surrounds a call: function transforms, compilation, forward-mode derivatives."""

import torch
from torch.autograd import forward_ad


def functorch_is_active() -> bool:
    """Whether the call runs under ``torch.func`` (vmap, grad, jvp, ...)."""
    return torch._C._are_functorch_transforms_active()


def needs_plain_formula() -> bool:
    """Whether something looks through the call and wants plain torch operators to look at."""
    return torch.compiler.is_compiling() or functorch_is_active() or forward_ad._current_level >= 0
