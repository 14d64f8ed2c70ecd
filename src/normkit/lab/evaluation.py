"""Loss and accuracies of a network on a split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.data import Split

EVALUATION_BATCH_SIZE = 500
TOP = 5  # an example counts for the top-5 accuracy if its class is among so many scores


@dataclass(frozen=True, slots=True)
class Scores:
    """What a pass of evaluation finds; accuracies are shares of the examples."""

    loss: float
    accuracy: float
    top5_accuracy: float | None  # None where there are no more than five classes


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
    sums, num_classes = torch.zeros(4, dtype=torch.float64, device=device), 0
    for index in _shared_out(len(split), *share):
        part = split.take(index).to(device)
        scores = model(part.inputs)
        num_classes = scores.shape[1]
        sums += _sums(scores, part.targets)
    if share[1] > 1:
        torch.distributed.all_reduce(sums)
    loss, num_right, num_among, num_examples = sums.tolist()
    top5 = num_among / num_examples if num_classes > TOP else None
    return Scores(loss / num_examples, num_right / num_examples, top5)


def _sums(scores: Float[Tensor, "n k"], targets: Int[Tensor, " n"]) -> Float[Tensor, " 4"]:
    """Sum of the losses, examples that are right, right among the best five, and there."""
    best = scores.topk(min(TOP, scores.shape[1])).indices == targets[:, None]
    loss = functional.cross_entropy(scores, targets, reduction="sum")
    return torch.stack([loss, best[:, 0].sum(), best.sum(), loss.new_tensor(len(targets))]).double()


def evaluate(model: nn.Module, split: Split) -> Scores:
    """Loss and accuracies in evaluation mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = scores_of(model, split, device)
    model.train(was_training)
    return found
