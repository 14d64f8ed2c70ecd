"""Passes over data that leave a model as it was: batches in, one layer's inputs out."""

from normkit.passes.bare import bare, require_bare, require_layers, require_uncompiled
from normkit.passes.batches import (
    Forward,
    arguments_of,
    as_list,
    device_of,
    forward_batch,
    moved,
    num_examples,
    require_batches,
)
from normkit.passes.data import Data, uncompiled
from normkit.passes.hooks import Inert, Temporary, swaps_statistics
from normkit.passes.inputs import first_calls, inputs_of
from normkit.passes.progress import progress
from normkit.passes.untouched import untouched

__all__ = [
    "Data",
    "Forward",
    "Inert",
    "Temporary",
    "arguments_of",
    "as_list",
    "bare",
    "device_of",
    "first_calls",
    "forward_batch",
    "inputs_of",
    "moved",
    "num_examples",
    "progress",
    "require_bare",
    "require_batches",
    "require_layers",
    "require_uncompiled",
    "swaps_statistics",
    "uncompiled",
    "untouched",
]
