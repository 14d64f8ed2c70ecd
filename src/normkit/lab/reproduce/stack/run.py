"""A deep stack of norms trained by gradient descent on a whole training set, and followed."""

from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

import normkit as nk
from normkit.lab.data import Examples
from normkit.lab.data.dataset import stratified_order
from normkit.lab.reproduce.networks import seeded_network
from normkit.lab.reproduce.preset import PresetTask
from normkit.lab.reproduce.records import Values
from normkit.lab.reproduce.training import Data
from normkit.lab.spec import Count

BLOCKED = "gnbn"


class StackSettings(Data):
    """A multilayer perceptron trained by gradient descent on a whole training set.

    Args:
        depth: Layers with a norm.
        width: Neurons of each.
        iterations: Steps; each sees the whole training set.
        learning_rate: Of plain gradient descent.
        every: Test error and shift are measured every so many iterations.
        groups: Of the group norms of GNBN.
        sizes: Examples of sampled training sets; none where it is the test set.
    """

    unused = ("num_train", "held_out")  # training sets come from the test set

    depth: Count = 20
    width: Count = 128
    iterations: Count = 80
    learning_rate: float = Field(default=0.1, gt=0)
    every: Count = 2
    groups: Count = 4
    sizes: tuple[Count, ...] = ()


def measure_shift(settings: StackSettings, arm: str, seed: int) -> Values:
    """Train on the test set or a sample of it, and follow errors and shift.

    Args:
        settings: What is trained.
        arm: ``bn``, ``gnbn`` or ``none``; with ``-N`` on N examples.
        seed: Of weights and sample.

    Returns:
        Curves over the measured iterations; shifts are by layer.
    """
    norm, _, size = arm.partition("-")
    dataset = settings.load_data()
    model = seeded_network(
        f"mlp:depth={settings.depth}:width={settings.width}",
        "bn" if norm == BLOCKED else norm,
        dataset,
        seed,
    )
    if norm == BLOCKED:
        nk.place_gnbn_(model, f"gn:{settings.groups}")
    test = _flat(dataset.test)
    train = test.take(stratified_order(test.targets, seed)[: int(size)]) if size else test
    found = _followed(model, train, test, settings)
    return found | {"norms": _positions(model), "num_train": len(train)}


def _flat(examples: Examples) -> Examples:
    """Pictures as rows of values, so that every pixel has statistics of its own."""
    return Examples(inputs=examples.inputs.flatten(1), targets=examples.targets)


def _positions(model: nn.Module) -> list[int]:
    """Which norms of the stack, counted from 1, have running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nk.BatchNorm | nk.GroupNorm)]
    return [place for place, m in enumerate(norms, start=1) if isinstance(m, nk.BatchNorm)]


def _followed(
    model: nn.Module, train: Examples, test: Examples, settings: StackSettings
) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    curves: dict[str, list[Any]] = {
        name: [] for name in ("iterations", "train_error", "test_error", "esm_mean", "esm_std")
    }
    input_shift = 0.0
    for iteration in range(settings.iterations + 1):
        measured = iteration > 0 and iteration % settings.every == 0
        if measured:  # of the parameters and estimates that the iterations so far have left
            rows = _shift(model, train, test)
            input_shift = rows["input_shift"]
            curves["iterations"].append(iteration)
            curves["test_error"].append(_error(model.eval(), test))
            curves["esm_mean"].append(rows["esm_mean"])
            curves["esm_std"].append(rows["esm_std"])
        optimizer.zero_grad()
        scores = model.train()(train.inputs)
        if measured:
            curves["train_error"].append(_share_wrong(scores, train))
        functional.cross_entropy(scores, train.targets).backward()
        optimizer.step()
    return curves | {"input_shift": input_shift}


def _shift(model: nn.Module, train: Examples, test: Examples) -> dict[str, Any]:
    if not any(isinstance(m, nk.BatchNorm) for m in model.modules()):
        return {"input_shift": 0.0, "esm_mean": [], "esm_std": []}
    found = nk.estimation_shift(model, [test.inputs], train_batches=[train.inputs]).layers
    return {
        "input_shift": found[0].esm_std,
        "esm_mean": [row.esm_mean for row in found[1:]],
        "esm_std": [row.esm_std for row in found[1:]],
    }


@torch.no_grad()
def _error(model: nn.Module, examples: Examples) -> float:
    return _share_wrong(model(examples.inputs), examples)


def _share_wrong(scores: torch.Tensor, examples: Examples) -> float:
    return (scores.argmax(1) != examples.targets).float().mean().item()


STACK = PresetTask(name="stack", measure=measure_shift)
