"""Sending data through a model, and restoring the model afterwards."""

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
from normkit.passes.cleanup import block_with_cleanup, call_with_cleanup, run_cleanup
from normkit.passes.data import Data, uncompiled
from normkit.passes.forwards import call_with, copied, replaced_forward
from normkit.passes.hooks import Hooks, InertHook, TemporaryHook, swaps_statistics
from normkit.passes.inputs import first_calls, inputs_of
from normkit.passes.progress import progress
from normkit.passes.rollback import all_or_nothing, attempt, changes_nothing
from normkit.passes.settings import save_grad_mode, save_stance
from normkit.passes.snapshot import Snapshot
from normkit.passes.untouched import untouched
from normkit.passes.unwrap import require_inspectable, require_uncompiled, require_unwrapped, unwrap

__all__ = [
    "Data",
    "Forward",
    "Hooks",
    "InertHook",
    "Snapshot",
    "TemporaryHook",
    "all_or_nothing",
    "arguments_of",
    "as_list",
    "attempt",
    "block_with_cleanup",
    "call_with",
    "call_with_cleanup",
    "changes_nothing",
    "copied",
    "device_of",
    "first_calls",
    "forward_batch",
    "inputs_of",
    "moved",
    "num_examples",
    "progress",
    "replaced_forward",
    "require_batches",
    "require_inspectable",
    "require_uncompiled",
    "require_unwrapped",
    "run_cleanup",
    "save_grad_mode",
    "save_stance",
    "swaps_statistics",
    "uncompiled",
    "untouched",
    "unwrap",
]
