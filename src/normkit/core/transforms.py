"""What surrounds a call: function transforms, compilation, forward-mode derivatives."""

import torch
from torch.autograd import forward_ad


def functorch_is_active() -> bool:
    """Whether the call runs under ``torch.func`` (vmap, grad, jvp, ...)."""
    return torch._C._are_functorch_transforms_active()


def needs_plain_formula() -> bool:
    """Whether something looks through the call and wants plain torch operators to look at."""
    return torch.compiler.is_compiling() or functorch_is_active() or forward_ad._current_level >= 0


def known_size(size: int) -> int:
    """A number even while ``torch.compile`` traces symbols: one graph for each map size.

    Divisions of sizes then need not be proved; with symbols a trace took ten times as long.
    """
    if not torch.compiler.is_compiling():
        return size
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # noqa: PLC0415 - slow import

    return int(guard_scalar(size))
