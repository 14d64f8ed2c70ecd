"""One step of training, one pass of evaluation, and how an epoch is cut into batches."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.data import Examples

EVALUATION_BATCH_SIZE = 500


def num_steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Training steps of an epoch: the last batch may be smaller, but not a single example."""
    full, rest = divmod(num_examples, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def batch_lengths(num_examples: int, batch_size: int) -> tuple[int, ...]:
    """The different lengths of an epoch's batches, the longest first: one or two."""
    full, rest = divmod(num_examples, batch_size)
    lengths = [batch_size] * (full > 0)
    return (*lengths, rest) if num_steps_per_epoch(num_examples, batch_size) > full else (*lengths,)


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


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Mean loss and accuracy in evaluation mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    loss = num_right = 0.0
    for index in torch.arange(len(examples)).split(EVALUATION_BATCH_SIZE):
        part = examples.take(index)
        scores = model(part.inputs)
        loss += functional.cross_entropy(scores, part.targets, reduction="sum").item()
        num_right += int((scores.argmax(1) == part.targets).sum())
    model.train(was_training)
    return loss / len(examples), num_right / len(examples)
