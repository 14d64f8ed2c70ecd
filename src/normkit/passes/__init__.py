"""Passes over data that leave a model as it was: batches in, one layer's inputs out."""

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
from normkit.passes.forwards import call_with, copied, forward_of
from normkit.passes.inputs import first_calls, inputs_of
from normkit.passes.progress import progress
from normkit.passes.untouched import untouched

__all__ = [
    "Data",
    "Forward",
    "arguments_of",
    "as_list",
    "call_with",
    "copied",
    "device_of",
    "first_calls",
    "forward_batch",
    "forward_of",
    "inputs_of",
    "moved",
    "num_examples",
    "progress",
    "require_batches",
    "uncompiled",
    "untouched",
]
