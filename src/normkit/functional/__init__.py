"""One function per method, without state: parameters and running statistics are arguments.

Shapes and formulas are those of the layers of the same name. ``weight`` and ``bias`` are
``(C,)`` or None. Where a method has running statistics, ``training=True`` normalises by the
input's own statistics and updates the given buffers in place; ``training=False`` normalises by the
buffers, mixed with a share of ``example_weight`` of each example's own statistics.
"""

from normkit.functional.arguments import Options, StatisticsOptions
from normkit.functional.composite import (
    batch_channel_norm,
    group_norm_plus,
    group_whitening,
    instance_batch_norm,
    switchable_norm,
)
from normkit.functional.over_batch import (
    batch_group_norm,
    batch_norm,
    general_batch_group_norm,
    ghost_batch_norm,
)
from normkit.functional.over_example import (
    group_norm,
    instance_norm,
    layer_norm,
    positional_norm,
)

__all__ = [
    "Options",
    "StatisticsOptions",
    "batch_channel_norm",
    "batch_group_norm",
    "batch_norm",
    "general_batch_group_norm",
    "ghost_batch_norm",
    "group_norm",
    "group_norm_plus",
    "group_whitening",
    "instance_batch_norm",
    "instance_norm",
    "layer_norm",
    "positional_norm",
    "switchable_norm",
]
