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
from normkit.passes.finish import between, finish, surely
from normkit.passes.forwards import call_with, copied, forward_of
from normkit.passes.hooks import Hooks, Inert, Temporary, swaps_statistics
from normkit.passes.inputs import first_calls, inputs_of
from normkit.passes.progress import progress
from normkit.passes.rollback import all_or_nothing, attempt, changes_nothing
from normkit.passes.settings import grad_mode_now, stance_now
from normkit.passes.snapshot import Snapshot
from normkit.passes.untouched import untouched

__all__ = [
    "Data",
    "Forward",
    "Hooks",
    "Inert",
    "Snapshot",
    "Temporary",
    "all_or_nothing",
    "arguments_of",
    "as_list",
    "attempt",
    "bare",
    "between",
    "call_with",
    "changes_nothing",
    "copied",
    "device_of",
    "finish",
    "first_calls",
    "forward_batch",
    "forward_of",
    "grad_mode_now",
    "inputs_of",
    "moved",
    "num_examples",
    "progress",
    "require_bare",
    "require_batches",
    "require_layers",
    "require_uncompiled",
    "stance_now",
    "surely",
    "swaps_statistics",
    "uncompiled",
    "untouched",
]
