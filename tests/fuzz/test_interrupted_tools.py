"""A user's model is left whole by every tool, wherever an exception or Ctrl-C comes.

Exceptions are raised at source lines of normkit, also while it puts things back, and in every
call of the user's own code: hooks, forwards, loaders, losses, metrics, optimizers. Afterwards the
model, the optimizer and torch's settings must be what they were.

``NORMKIT_FUZZ_SECONDS`` searches for so long, from a seed that is printed, and says all it finds;
otherwise the same trials are made in every run. ``NORMKIT_FUZZ_SEED`` chooses the seed.
"""

from __future__ import annotations

import inspect
import os
import random
import time
from tempfile import TemporaryDirectory

import pytest
from torch import nn

import normkit as nk
from fuzz.interruption import carried_out, profiled
from fuzz.tools import TOOLS
from normkit import weights

SECONDS = float(os.environ.get("NORMKIT_FUZZ_SECONDS", "0"))
NUM_TRIALS = {"line": 5, "call": 2, "both": 2}  # of each tool, where no seconds are given
FEW = {"diagnose": 1}  # which takes seconds
MOST_PRINTED = 3


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("name", TOOLS)
def test_a_model_is_left_whole(name, tmp_path):
    seed = int(os.environ.get("NORMKIT_FUZZ_SEED", time.time_ns() % 10**9 if SECONDS else 0))
    draw, benches, tried, found = random.Random(f"{name} {seed}"), [], [], {}
    profile = profiled(TOOLS[name], tmp_path / "file")
    assert not TOOLS[name].measures or profile.changes == [], "without any interruption"
    for trial in trials(name, profile, draw):
        findings = carried_out(trial, TOOLS[name], tmp_path / "file", benches)
        tried.append(trial)
        if findings:
            found.setdefault(findings[0][:40], (trial, findings))
    lines = {trial.line[:2] for trial in tried if trial.line} & set(profile.lines)
    print(f"{name}: seed {seed}, {len(tried)} trials at {len(lines)} of {len(profile.lines)} lines")
    if found:
        reports = [script(name, *each) for each in list(found.values())[:MOST_PRINTED]]
        pytest.fail("\n\n".join([f"{len(found)} sorts of findings", *reports]), pytrace=False)


def trials(name, profile, draw):
    """Trials of a tool: as many as there are seconds for, or a few of each kind."""
    kinds = [kind for kind, number in NUM_TRIALS.items() for _ in range(FEW.get(name, number))]
    kinds = [kind for kind in kinds if kind == "line" or profile.num_calls]
    if not SECONDS:
        yield from (profile.drawn(kind, draw) for kind in kinds)
        return
    end = time.monotonic() + SECONDS / len(TOOLS)
    for trial in profile.all_lines(draw):
        if time.monotonic() > end:
            return
        yield trial
    while time.monotonic() < end:
        yield profile.drawn(draw.choice(kinds), draw)


def script(name, trial, findings):
    """A script that shows what was found."""
    lines = [f"# {each}" for each in findings[:5]]
    return "\n".join(
        [
            *lines,
            "from fuzz.interruption import Trial",
            "from fuzz.test_interrupted_tools import repeat",
            "",
            f"repeat({name!r}, {trial})",
        ]
    )


def repeat(name, trial):
    """Carry out one trial again, and print what it leaves otherwise than it was."""
    with TemporaryDirectory() as folder:
        findings = carried_out(trial, TOOLS[name], f"{folder}/file", [])
    print("\n".join(findings) or "everything is as it was")


MODELS = ("model", "optimizer", "layer")
AT_ONCE = {"Probe": "Probe", "Accumulation": "accumulate_statistics"}
"""Classes of which one trial calls everything."""
HARMLESS = {"Tuning.plot", "Conversion.recipe", "register_norm"}  # the last takes a class


def takes_a_model(function):
    """Whether one of the arguments is a model, or an optimizer."""
    return any(name in MODELS for name in inspect.signature(function).parameters)


def tools():
    """Give the names of all public functions and methods that could touch a model."""
    names = [*nk.__all__, *(f"weights.{name}" for name in weights.__all__)]
    for name in names:
        value = getattr(weights if "." in name else nk, name.removeprefix("weights."))
        if inspect.isfunction(value) and takes_a_model(value):
            yield name
        is_result = inspect.isclass(value) and not issubclass(value, nn.Module | Exception)
        if is_result and takes_a_model(value):
            yield from methods(name, value)


def methods(name, kind):
    """Give the methods of a class that holds a model."""
    if name in AT_ONCE:
        yield AT_ONCE[name]
        return
    for each in vars(kind):
        if not each.startswith("_") and callable(getattr(kind, each, None)):
            yield f"{name}.{each}"


def test_every_tool_that_is_given_a_model_is_tried():
    tried = {name.split(",")[0] for name in TOOLS}
    tried |= {name.removeprefix("weights.") for name in tried}
    wanted = {name for name in tools() if name.removeprefix("weights.") not in tried}
    assert wanted - HARMLESS == set()
    assert len(set(tools())) > 30
