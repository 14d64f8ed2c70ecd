"""Loss and accuracies of a network that classifies, on a split."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from normkit.errors import DataError
from normkit.lab.data import Split
from normkit.lab.torchvision_ops import register_missing_operators

EVALUATION_BATCH_SIZE = 500
TOP = 5  # an example counts for the top-5 accuracy if its class is among so many scores
ACCURACY, LOSS, TOP5 = "accuracy", "loss", "top5_accuracy"
WEIGHT, SHIFT, DISTANCE = "weight", "shift", "distance"
NO_SHARES = (LOSS, WEIGHT, SHIFT, DISTANCE)  # what the names of other numbers end with


def is_share(name: str) -> bool:
    """Whether a number of a network is a share, which is written in percent.

    Example:
        >>> is_share("top5_accuracy"), is_share("training loss"), is_share("center_distance")
        (True, False, False)
    """
    return not name.endswith(NO_SHARES)


def shared_out(
    num_examples: int, rank: int, size: int, most: int = EVALUATION_BATCH_SIZE
) -> Sequence[Int[Tensor, " b"]]:
    """Positions of the batches of one process; all have equally many batches.

    Each forward of a process may wait for one of the others. Fewer examples than processes are
    evaluated by all of them, which has the same mean.

    Args:
        num_examples: Examples of all processes.
        rank: This process's number.
        size: The number of processes.
        most: Examples of a batch; one more where they cannot be shared out equally, and all where
            there are fewer examples than processes.
    """
    order = torch.arange(num_examples)
    if size == 1:
        return order.split(most)
    if num_examples < size:
        return [order]
    num_batches = min(-(-num_examples // (size * most)), num_examples // size)
    return order[rank::size].tensor_split(num_batches)


def shared_out_singly(num_examples: int, rank: int, size: int) -> list[tuple[int, bool]]:
    """Positions of one process's examples that are evaluated one by one, and whether each counts.

    All processes have equally many, as in :func:`shared_out`: the last one of some is evaluated
    twice, and counts once. Fewer examples than processes are evaluated, and count, on all.
    """
    if num_examples < size:
        return [(at, True) for at in range(num_examples)]
    own = [(at, True) for at in range(rank, num_examples, size)]
    return own + [(own[-1][0], False)] * (-(-num_examples // size) - len(own))


def gather_states_(metric: Any, num_examples: int, size: int) -> None:
    """Give a metric whose states are lists what those of the other processes have seen.

    The metric's own exchange takes lists of equal lengths only. All processes have to call it.

    Args:
        metric: Of torchmetrics, with states on the CPU.
        num_examples: Examples of all processes; if fewer than processes, each has seen all.
        size: The number of processes.
    """
    if size == 1 or num_examples < size:
        return
    states: list[Any] = [None] * size
    torch.distributed.all_gather_object(states, metric.metric_state)
    for name in metric.metric_state:
        setattr(metric, name, [value for state in states for value in state[name]])


@torch.no_grad()
def scores_of(
    model: Callable[[Tensor], Tensor],
    split: Split,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Loss and accuracies of a model that is in evaluation mode.

    Args:
        model: Gives a row of scores for each input.
        split: Examples, or where they are read from.
        device: Where the model is.
        share: This process's number and the number of processes, which share the examples; what
            they find is put together.

    Returns:
        ``accuracy`` and ``top5_accuracy``, shares of the examples, and ``loss``, their mean
        cross-entropy; ``top5_accuracy`` only where there are more than five classes.
    """
    metrics: dict[str, Any] = {}
    for index in shared_out(len(split), *share):
        part = split.take(index).to(device)
        scores = model(part.inputs)
        metrics = metrics or _metrics(scores.shape[1], device, together=share[1] > 1)
        loss = functional.cross_entropy(scores, part.targets, reduction="none")
        metrics[LOSS].update(loss.double())
        for name in metrics.keys() - {LOSS}:
            metrics[name].update(scores, part.targets)
    found = {name: metric.compute().item() for name, metric in metrics.items()}
    return {n: v if n == LOSS else _exact(v, len(split)) for n, v in found.items()}


def _metrics(num_classes: int, device: torch.device, *, together: bool) -> dict[str, Any]:
    """The metrics by name; several processes put their counts together when they compute."""
    library = metrics_library()
    options = {"sync_on_compute": together}
    counts = {"average": "micro", "validate_args": False} | options
    accuracy = metrics_library("classification").MulticlassAccuracy
    found = {
        ACCURACY: accuracy(num_classes, **counts),
        LOSS: library.MeanMetric(nan_strategy="disable", **options).set_dtype(torch.float64),
    }
    if num_classes > TOP:
        found[TOP5] = accuracy(num_classes, top_k=TOP, **counts)
    return {name: metric.to(device) for name, metric in found.items()}


@cache
def metrics_library(part: str | None = None) -> Any:
    """torchmetrics, or the part of it that is called ``torchmetrics.PART``.

    It imports torchvision; that takes two seconds, and is done when needed.
    """
    register_missing_operators()
    return import_module("torchmetrics" if part is None else f"torchmetrics.{part}")


def _exact(share: float, num_examples: int) -> float:
    """A share of the examples that was computed in float32, in float64."""
    return round(share * num_examples) / num_examples


def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Loss and accuracies in evaluation mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = scores_of(model, split, device)
    model.train(was_training)
    return found


def require_scores(scores: object, num_examples: int, num_classes: int) -> None:
    """Refuse what is not a row of scores for each example.

    Raises:
        DataError: With what the network gave.
    """
    if isinstance(scores, Tensor) and scores.shape == (num_examples, num_classes):
        return
    given = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
    raise DataError(
        f"the network gave {given} for {num_examples} examples of {num_classes} classes; it gives "
        f"a tensor ({num_examples}, {num_classes})"
    )
