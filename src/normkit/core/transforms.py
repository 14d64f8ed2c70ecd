"""What surrounds a call: function transforms, compilation, forward-mode derivatives."""

import torch

from normkit.kernels.select import transform


def needs_plain_formula() -> bool:
    """Whether something looks through the call and wants plain torch operators to look at."""
    return torch.compiler.is_compiling() or transform() is not None


def known_size(size: int) -> int:
    """A number even while ``torch.compile`` traces symbols: one graph for each map size.

    Divisions of sizes then need not be proved; with symbols a trace took ten times as long.
    """
    return int(known_number(size)) if torch.compiler.is_compiling() else size


def known_number(number: float) -> float:
    """The number that a symbol stands for while ``torch.compile`` traces."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # slow import

    return guard_scalar(number)
