"""The fuzzer finds faults, simplifies them, and writes them as scripts that run."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import normkit as nk
import oracle
from fuzz.check import check
from fuzz.rounding import Recorded, Rounding
from fuzz.script import script
from fuzz.shrink import smallest
from fuzz.trial import LAYERS, draw


def trial_of(kind, seed):
    return replace(draw(kind, random.Random(seed)), kernels="reference")


@pytest.mark.parametrize("kind", ["bn", "gn", "bcn"])
def test_an_error_of_a_ten_thousandth_is_found_and_made_small(kind, monkeypatch):
    from normkit.kernels import reference  # what is broken here

    right = reference.apply
    monkeypatch.setattr(reference, "apply", lambda x, *given: right(x, *given) * 1.0001)
    findings = [f for f in (check(trial_of(kind, seed)) for seed in range(8)) if f is not None]
    assert len(findings) > 3
    small = smallest(findings[0])
    assert small.what == "y"
    assert small.expected.numel() <= 16
    monkeypatch.setattr(reference, "apply", right)
    assert check(small.trial) is None


def test_the_script_prints_what_was_found():
    trial = trial_of("bn", 1)
    finding = smallest(broken(trial))
    done = subprocess.run(
        [sys.executable, "-c", script(finding)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("y tensor(")
    assert "gradient of x tensor(" in done.stdout
    assert "but y is, in float64, [" in done.stdout


def broken(trial):
    """A finding of a layer whose results are 1 too large."""
    right = nk.BatchNorm.__call__
    nk.BatchNorm.__call__ = lambda self, x: right(self, x) + 1
    try:
        return check(trial)
    finally:
        nk.BatchNorm.__call__ = right


def test_rounding_grows_with_an_offset_unless_sums_are_taken_around_the_mean():
    x, ids = torch.randn(40, dtype=torch.float64), torch.zeros(40, dtype=torch.long)
    errors = {}
    for around in (False, True):
        for offset in (0, 1e4):
            recorded = Recorded()
            exact = moments(x + offset, ids, recorded)
            found = moments(x + offset, ids, Rounding(1e-7, around, recorded, seed=0))
            errors[around, offset] = max(
                (a - b).abs().max() for a, b in zip(exact, found, strict=True)
            )
    assert errors[False, 1e4] > 1e3 * errors[False, 0]
    assert errors[True, 1e4] < 2 * errors[True, 0]


def moments(x, ids, arithmetic):
    with oracle.arithmetic(arithmetic):
        return oracle.group_moments(x, ids)


def test_every_layer_is_tried():
    others = {"GroupNormPlus", "GroupWhitening"}
    names = {name for name in nk.__all__ if name.endswith("Norm") or name in others}
    assert {layer.__name__ for layer in LAYERS.values()} == names
