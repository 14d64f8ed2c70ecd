"""One step of training, one pass of evaluation, and how an epoch is cut into batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.data import Examples, Split
from normkit.lab.torchvision_ops import register_missing_operators

EVALUATION_BATCH_SIZE = 500
TOP = 5  # an example counts for the top-5 accuracy if its class is among so many scores


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Training steps of an epoch: the last batch may be smaller, but not a single example."""
    full, rest = divmod(num_examples, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def batches(order: Int[Tensor, " n"], batch_size: int) -> Iterator[Int[Tensor, " b"]]:
    """Cut an epoch's order into batches; a last batch of one example is left out."""
    num_batches = num_steps_per_epoch(len(order), batch_size)
    return iter(order.split(batch_size)[:num_batches])


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Examples
) -> tuple[float, int]:
    """One step of the optimizer.

    Returns:
        The loss before the step and the number of examples that were classified rightly.
    """
    optimizer.zero_grad(set_to_none=True)
    scores = model(batch.inputs)
    loss = functional.cross_entropy(scores, batch.targets)
    loss.backward()
    optimizer.step()
    return loss.item(), int((scores.argmax(1) == batch.targets).sum())


@dataclass(frozen=True, slots=True)
class Scores:
    """What a pass of evaluation finds; accuracies are shares of the examples."""

    loss: float
    accuracy: float
    top5_accuracy: float | None  # None where there are no more than five classes


@cache
def _metrics() -> Any:  # noqa: ANN401 - a module, slow to import
    register_missing_operators()
    import torchmetrics  # noqa: PLC0415 - as above

    return torchmetrics


def _shared_out(num_examples: int, rank: int, size: int) -> Sequence[Int[Tensor, " b"]]:
    """Batches of one process; all have equally many, for each forward meets those of the others.

    Fewer examples than processes are evaluated by all of them, which has the same mean.
    """
    order = torch.arange(num_examples)
    if size == 1:
        return order.split(EVALUATION_BATCH_SIZE)
    if num_examples < size:
        return [order]
    return order[rank::size].tensor_split(-(-num_examples // (size * EVALUATION_BATCH_SIZE)))


@torch.no_grad()
def scores_of(
    model: Callable[[Tensor], Tensor],
    split: Split,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> Scores:
    """Loss and accuracies of a model that is in evaluation mode.

    Args:
        model: Gives a row of scores for each input.
        split: Examples, or where they are read from.
        device: Where the model is.
        share: This process's number and the number of processes, which share the examples; what
            they find is put together.
    """
    metrics = _metrics()
    mean, accuracies = metrics.MeanMetric().to(device), dict[int, Any]()
    for index in _shared_out(len(split), *share):
        part = split.take(index).to(device)
        scores = model(part.inputs)
        num_classes = scores.shape[1]
        for top in (1, TOP) if num_classes > TOP else (1,):
            accuracy = accuracies.get(top) or metrics.classification.MulticlassAccuracy(
                num_classes, top_k=top, average="micro", validate_args=False
            ).to(device)
            accuracy.update(scores, part.targets)
            accuracies[top] = accuracy
        mean.update(functional.cross_entropy(scores, part.targets), weight=len(part))
    found = {top: float(metric.compute()) for top, metric in accuracies.items()}
    return Scores(float(mean.compute()), found[1], found.get(TOP))


def evaluate(model: nn.Module, split: Split) -> Scores:
    """Loss and accuracies in evaluation mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = scores_of(model, split, device)
    model.train(was_training)
    return found
