"""The surroundings of a call: function transforms, compilation, forward-mode derivatives."""

import torch

from normkit.kernels.select import transform


def needs_plain_formula() -> bool:
    """Whether a compiler or transform traces the call and needs plain torch operators."""
    return torch.compiler.is_compiling() or transform(False) is not None


def known_size(size: int) -> int:
    """The size as an ``int``, also while ``torch.compile`` traces with symbolic sizes.

    There is then one graph for each map size. The compiler need not prove that sizes divide, which
    made a trace ten times as long.
    """
    return int(known_number(size)) if torch.compiler.is_compiling() else size


def known_number(number: float) -> float:
    """The value of a symbolic number while ``torch.compile`` traces."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # slow import

    return guard_scalar(number)
