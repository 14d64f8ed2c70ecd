"""From a trial that fails to a smaller one that fails in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from fuzz.check import Finding, check
from fuzz.trial import Step, Trial


def smallest(finding: Finding, tries: int = 300) -> Finding:
    """Simplify a trial step by step, as long as it fails in the same place."""
    left = tries
    found = finding
    while left > 0:
        for trial in simpler(found.trial):
            left -= 1
            again = check_quietly(trial)
            if again is not None and again.what == found.what:
                found = again
                break
            if left == 0:
                return found
        else:
            return found
    return found


def check_quietly(trial):
    """Treat an impossible trial as one without a finding."""
    try:
        return check(trial)
    except Exception:  # noqa: BLE001 - whatever it is, the trial is not what is looked for
        return None


def simpler(trial: Trial) -> Iterator[Trial]:
    """Trials in which one part is simplified."""
    yield from with_fewer_steps(trial)
    yield from with_smaller_maps(trial)
    yield from with_fewer_channels(trial)
    yield from with_plainer_options(trial)
    for index, step in enumerate(trial.steps):
        for less in simpler_steps(step, prod(trial.spatial) * trial.num_features):
            yield replace(trial, steps=(*trial.steps[:index], less, *trial.steps[index + 1 :]))


def with_fewer_steps(trial):
    for index in range(len(trial.steps)):
        if len(trial.steps) > 1:
            yield replace(trial, steps=trial.steps[:index] + trial.steps[index + 1 :])


def with_smaller_maps(trial):
    for axis, size in enumerate(trial.spatial):
        before, after = trial.spatial[:axis], trial.spatial[axis + 1 :]
        yield replace(trial, spatial=before + after)
        for less in (1, 2, size // 2):
            if 0 < less < size:
                yield replace(trial, spatial=(*before, less, *after))


def with_plainer_options(trial):
    plain = {"wants": ("x",), "dtype": "float32", "statistics": "fresh", "threads": 1}
    for name, value in ({"parameters": trial.dtype} | plain).items():
        if getattr(trial, name) != value:
            yield replace(trial, **{name: value})
    usual = {"affine": False, "eps": 1e-5, "momentum": 0.1, "example_weight": 0.0}
    for name, value in usual.items():
        if dict(trial.options).get(name, name == "affine" or value) != value:
            yield with_option(trial, name, value)


def with_fewer_channels(trial):
    for less in (1, 2, trial.num_features // 2):
        if 0 < less < trial.num_features:
            fewer = replace(trial, num_features=less)
            groups = dict(trial.options).get("num_groups")
            fits = groups is None or less % groups == 0
            yield fewer if fits else with_option(fewer, "num_groups", 1)


def with_option(trial, name, value):
    return replace(trial, options=tuple((dict(trial.options) | {name: value}).items()))


def simpler_steps(step: Step, per_example: int) -> Iterator[Step]:
    """Steps in which one part is simplified."""
    for less in (1, 2, step.num_examples // 2, step.num_examples - 1):
        if 0 < less < step.num_examples:
            kept = tuple((p % (less * per_example), v) for p, v in step.bad)
            yield replace(step, num_examples=less, bad=kept)
    plain = {"bad": (), "layout": "contiguous", "grad_layout": "contiguous", "pattern": "normal",
             "offset": 0.0, "channel_offset": 0.0, "scale": 1.0, "mask": ""}  # fmt: skip
    for name, value in plain.items():
        if getattr(step, name) != value:
            yield replace(step, **{name: value})
    if len(step.bad) > 1:
        yield replace(step, bad=step.bad[:1])
