"""The figures of a stack of norms."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from normkit.lab.figures import Curve, draw_curves
from normkit.lab.reproduce.preset import Runs, by_seed
from normkit.lab.reproduce.stack.readings import of_norm
from normkit.lab.reproduce.tasks.networks import NO_NORM
from normkit.lab.reproduce.tasks.stack import BLOCKED


def _draw_errors(axes: Any, runs: Runs, arms: Mapping[str, str]) -> None:
    first = next(iter(runs.values()))
    lines = [
        Curve(
            label=f"{label}, {kind}",
            x=first[arm]["iterations"],
            values=by_seed(runs, arm, f"{kind}_error"),
        )
        for arm, label in arms.items()
        for kind in ("train", "test")
    ]
    draw_curves(axes, lines, {"title": "errors", "x": "iteration", "y": "share wrong"})


def _draw_layers(axes: Any, runs: Runs, arm: str, name: str, title: str) -> None:
    """The shift of about five layers over time."""
    first = next(iter(runs.values()))[arm]
    curves, places = by_seed(runs, arm, name), first["norms"]
    shown = sorted({round(i) for i in np.linspace(0, len(places) - 1, 5)})
    lines = [
        Curve(label=f"layer {places[i]}", x=first["iterations"], values=curves[:, :, i])
        for i in shown
    ]
    draw_curves(axes, lines, {"title": title, "x": "iteration", "y": "ESM"})
    axes.set_yscale("log")


def draw_equal_sets(figure: Any, runs: Runs) -> None:
    """Errors, and both shifts of several layers, over time."""
    errors, means, stds = figure.subplots(1, 3)
    _draw_errors(errors, runs, {"bn": "BN"})
    _draw_layers(means, runs, "bn", "esm_mean", "ESM of the means")
    _draw_layers(stds, runs, "bn", "esm_std", "ESM of the standard deviations")


def draw_blocked(figure: Any, runs: Runs) -> None:
    """Errors of BN and GNBN, and the shift of GNBN's and BN's layers over time."""
    errors, blocked, plain = figure.subplots(1, 3)
    _draw_errors(errors, runs, {"bn": "BN", BLOCKED: "GNBN"})
    _draw_layers(blocked, runs, BLOCKED, "esm_std", "ESM (std), GNBN")
    _draw_layers(plain, runs, "bn", "esm_std", "ESM (std), BN")
    limits = [axes.get_ylim() for axes in (blocked, plain)]
    for axes in (blocked, plain):
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _sizes(runs: Runs, norm: str) -> list[str]:
    first = next(iter(runs.values()))
    return [f"{norm}-{size}" for size in of_norm(first, norm)]


def _draw_depth(axes: Any, runs: Runs, arms: Mapping[str, str]) -> None:
    """The shift of every layer at the end."""
    first = next(iter(runs.values()))
    lines = [
        Curve(label=label, x=first[arm]["norms"], values=by_seed(runs, arm, "esm_std")[:, -1])
        for arm, label in arms.items()
    ]
    draw_curves(axes, lines, {"title": "ESM (std) at the end", "x": "layer", "y": "ESM"})
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_samples(figure: Any, runs: Runs) -> None:
    """Test errors by size of the training set, and the last shift by depth."""
    errors, depth = figure.subplots(1, 2)
    _draw_error_by_size(errors, runs, {"bn": "BN", NO_NORM: "no norm"})
    _draw_depth(depth, runs, {arm: f"BN, {arm[3:]} examples" for arm in _sizes(runs, "bn")})


def draw_blocked_samples(figure: Any, runs: Runs) -> None:
    """The last shift of BN and GNBN by depth, and their test errors by size."""
    depth, errors = figure.subplots(1, 2)
    sizes = _sizes(runs, "bn")
    shown = {
        arm.replace("bn", name, 1): f"{label}, {arm[3:]} examples"
        for arm in (sizes[0], sizes[-1])
        for name, label in (("bn", "BN"), (BLOCKED, "GNBN"))
    }
    _draw_depth(depth, runs, shown)
    _draw_error_by_size(errors, runs, {"bn": "BN", BLOCKED: "GNBN"})


def _draw_error_by_size(axes: Any, runs: Runs, norms: Mapping[str, str]) -> None:
    lines = [
        Curve(
            label=label,
            x=[int(arm.split("-")[1]) for arm in arms],
            values=np.stack([by_seed(runs, arm, "test_error")[:, -1] for arm in arms], axis=1),
        )
        for norm, label in norms.items()
        for arms in [_sizes(runs, norm)]
    ]
    draw_curves(axes, lines, {"title": "test error", "x": "training examples", "y": "share wrong"})
    axes.set_xscale("log", base=2)
