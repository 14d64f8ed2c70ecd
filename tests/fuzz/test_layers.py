"""Layers against their definitions over drawn shapes, memory, dtypes, values, modes and kernels.

``NORMKIT_FUZZ_SECONDS`` searches for so long, from a seed that is printed, and says all it finds;
otherwise the same trials are made in every run. ``NORMKIT_FUZZ_SEED`` chooses the first seed.
"""

from __future__ import annotations

import os
import random
import sys
import time

import pytest

from fuzz.check import check
from fuzz.script import script
from fuzz.shrink import smallest
from fuzz.trial import LAYERS, draw

SECONDS = float(os.environ.get("NORMKIT_FUZZ_SECONDS", "0"))
NUM_TRIALS = 90  # of each layer, where no seconds are given
MOST_PRINTED = 3


def seeds(kind):
    """Seeds of trials, one after another, until the time or their number is over."""
    if not SECONDS:
        yield from range(NUM_TRIALS)
        return
    first = int(os.environ.get("NORMKIT_FUZZ_SEED", time.time_ns() % 10**9))
    sys.stderr.write(f"{kind}: the first seed is {first}\n")
    end, seed = time.monotonic() + SECONDS / len(LAYERS), first
    while time.monotonic() < end:
        yield seed
        seed += 1


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_its_definition(kind):
    found, number = {}, 0
    for seed in seeds(kind):
        number += 1
        finding = check(draw(kind, random.Random(f"{kind} {seed}")))
        if finding is not None:
            found.setdefault(finding.sort, finding)
    sys.stderr.write(f"{kind}: {number} trials, {len(found)} sorts of findings\n")
    reports = [script(smallest(finding)) for finding in list(found.values())[:MOST_PRINTED]]
    others = [str(sort) for sort in list(found)[MOST_PRINTED:]]
    if found:
        pytest.fail("\n\n".join([f"{number} trials", *reports, *others]), pytrace=False)
