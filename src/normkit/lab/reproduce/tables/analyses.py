"""Analyses of a trained network whose numbers tables show: means over its layers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

import normkit as nk
from normkit.lab.reproduce.tables.subject import Subject, Values
from normkit.passes import device_of, moved

BATCH_SIZE, NUM_BATCHES = 32, 4  # of validation examples
NUM_FILTERS, NUM_PROBES, RATE = 2, 8, 0.1  # filters of a layer, vectors for each, a step's rate

Pairs = list[tuple[Tensor, Tensor]]


def _mean(rows: Any, name: str) -> float:
    return statistics.fmean(getattr(row, name) for row in rows)


def _hessian(model: nn.Module, pairs: Pairs) -> Values:
    rows = nk.hessian_norms(model, pairs[:1], num_filters=NUM_FILTERS, num_probes=NUM_PROBES).layers
    return {"reduction": _mean(rows, "reduction"), "least": _mean(rows, "least_reduction")}


def _projected(model: nn.Module, pairs: Pairs) -> Values:
    rows = nk.projected_updates(model, pairs, rate=RATE).layers
    return {
        "projected": _mean(rows, "projected_degrees"),
        "raw": _mean(rows, "standardized_degrees"),
        "ratio": statistics.geometric_mean(row.rate_ratio for row in rows),
    }


def _singularity(model: nn.Module, _pairs: Pairs) -> Values:
    return {"ratio": nk.singularity_ratio(model).ratio}


def _similarity(model: nn.Module, pairs: Pairs) -> Values:
    rows = nk.similarity_propagation(model, pairs).layers[1:]  # the first sees the picture
    columns = {"before": "input", "after": "output", "predicted": "predicted"}
    return {name: _mean(rows, f"{column}_difference") for name, column in columns.items()}


def _bound(model: nn.Module, pairs: Pairs) -> Values:
    rows = nk.output_bound(model, pairs).layers
    return {
        "training": max(row.share for row in rows),
        "evaluation": max(row.largest_evaluation / row.bound for row in rows),
    }


ANALYSES: Mapping[str, tuple[Callable[[nn.Module, Pairs], Values], tuple[str, ...]]] = (
    MappingProxyType(
        {
            "hessian": (_hessian, ("reduction", "least")),
            "projected": (_projected, ("projected", "raw", "ratio")),
            "singularity": (_singularity, ("ratio",)),
            "similarity": (_similarity, ("before", "after", "predicted")),
            "bound": (_bound, ("training", "evaluation")),
        }
    )
)
"""What measures each, and the numbers that it gives."""


def analysed(model: nn.Module, subject: Subject, name: str) -> Values:
    """The numbers of an analysis; None of all where the network has nothing that it is about.

    Args:
        model: The network, left as it is.
        subject: What it was trained for; 128 validation examples are looked at.
        name: A key of ``ANALYSES``.
    """
    measure, numbers = ANALYSES[name]
    pairs = subject.batches("validation", BATCH_SIZE, NUM_BATCHES)
    try:
        return measure(model, [moved(pair, device_of(model)) for pair in pairs])
    except nk.OptionError:
        return dict.fromkeys(numbers)
