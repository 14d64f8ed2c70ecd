"""What is read off a trained network besides its test score: how, and which number."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.convert.placement.blocks import find_layout
from normkit.errors import SpecError
from normkit.inference.tracked import tracked
from normkit.lab.data import Dataset, Split
from normkit.lab.evaluation import ACCURACY, LOSS, TOP5, evaluate
from normkit.lab.frozen import Frozen
from normkit.lab.records import Outcome
from normkit.lab.reproduce.tables.analyses import ANALYSES, analysed
from normkit.lab.task import finite_scores
from normkit.layers.base import TrackingLayer
from normkit.text import listed
from normkit.tune.grids import grid_for

Values = dict[str, float | None]
Taken = Mapping[str, Values]  # by split
PLAIN = "plain"
EPOCHS = "epochs"
SPLITS = ("validation", "test")
OF_SPLITS = (ACCURACY, LOSS, TOP5, "weight")
TRAINING = {"training accuracy": "train_accuracy", "training loss": "train_loss"}
OF_EPOCHS = TRAINING | {"validation accuracy": ACCURACY, "validation loss": LOSS}
NUM_DRAWS, NUM_BLOCKS = 5, 6  # disturbed statistics: Huang et al., Fig. 8
BATCH_SIZE = 256  # of pictures that statistics are measured on


class Reading(Frozen):
    """A number that is read off each trained network.

    It is written as ``STATE``, or as ``STATE: NUMBER``. A state is how the network is evaluated:

    ==================  ================================================================
    plain               as it was trained
    weight=A            with the example weight ``A``
    tuned-for-accuracy  with the example weight that is best on validation examples
    tuned-for-loss      the same by their cross entropy
    recalibrated        by the statistics of the training examples, not augmented
    test-statistics     by the statistics of the test examples
    disturbed=D         by statistics disturbed by ``D`` in the first norm of the first six
                        residual blocks; a mean over five draws
    epochs              not at all: means over the epochs of the training
    hessian             not at all: ``nk.hessian_norms``, ``reduction`` and ``least``
    projected           not at all: ``nk.projected_updates``, ``projected``, ``raw``, ``ratio``
    singularity         not at all: ``nk.singularity_ratio``, ``ratio``
    similarity          not at all: ``nk.similarity_propagation``, ``before``, ``after``,
                        ``predicted``
    bound               not at all: ``nk.output_bound``, the largest share of the bound in
                        ``training`` and at ``evaluation``
    ==================  ================================================================

    Networks without running statistics are evaluated as they were trained. A number is one of
    ``accuracy`` (the default), ``loss``, ``top5_accuracy`` and ``weight``, the example weight; of
    ``epochs`` it is ``training accuracy``, ``training loss``, or those of validation. Analyses look
    at 128 validation examples.

    Args:
        state: How the network is evaluated.
        number: What is taken.

    Example:
        >>> Reading.parse("tuned-for-loss: loss").state
        'tuned-for-loss'
    """

    state: str
    number: str = OF_SPLITS[0]

    @classmethod
    def parse(cls, text: str) -> Reading:
        """Read what a preset says.

        Raises:
            SpecError: If there is no such state or number.
        """
        state, _, number = (part.strip() for part in text.partition(":"))
        numbers = _numbers(state)
        if (number or numbers[0]) not in numbers:
            raise SpecError(
                f"a reading {text!r} was given; the numbers of {state} are {listed(numbers)}"
            )
        return cls(state=state, number=number or numbers[0])

    @property
    def is_share(self) -> bool:
        """Whether the number is a share, which tables have in percent."""
        return self.number.endswith("accuracy")

    @property
    def is_analysis(self) -> bool:
        """Whether it is no score."""
        return self.state in ANALYSES

    @property
    def of_network(self) -> bool:
        """Whether the network is needed, and not only the record of its training."""
        return self.state != EPOCHS

    def value(self, taken: Mapping[str, Taken], split: str) -> float | None:
        """The number, of all that was taken of a network."""
        return taken[self.state][split].get(self.number)

    def of_epochs(self, outcome: Outcome) -> float | None:
        """The mean over the epochs of a training; None if it diverged."""
        values = [
            getattr(epoch, OF_EPOCHS[self.number])
            if self.number in TRAINING
            else epoch.validation_scores.get(OF_EPOCHS[self.number])
            for epoch in outcome.epochs
        ]
        finite = [value for value in values if value is not None]
        if outcome.status == "diverged" or not values or len(finite) < len(values):
            return None
        return sum(finite) / len(finite)


def take(model: nn.Module, dataset: Dataset[Split], state: str) -> Taken:
    """Evaluate a trained network in a state, on validation and test examples.

    The network is left as it was.

    Args:
        model: The network.
        dataset: What it was trained on.
        state: As ``Reading`` has it.

    Raises:
        SpecError: If there is no such state.
    """
    if state in ANALYSES:
        return dict.fromkeys(SPLITS, analysed(model, dataset, state))
    name, argument = _parsed(state)
    model = copy.deepcopy(model)
    if not tracked(model):
        name, argument = PLAIN, None
    return STATES[name](model, dataset, argument)


def _plain(model: nn.Module, dataset: Dataset[Split], _argument: Any = None) -> Taken:
    return {split: _scores(model, getattr(dataset, split)) for split in SPLITS}


def _scores(model: nn.Module, split: Split) -> Values:
    found: Values = dict(finite_scores(evaluate(model, split)))
    weights = {m.example_weight for m in model.modules() if isinstance(m, TrackingLayer)}
    return found | {"weight": float(weights.pop()) if len(weights) == 1 else None}


def _weighed(model: nn.Module, dataset: Dataset[Split], weight: float) -> Taken:
    nk.set_example_weight(model, weight)
    return _plain(model, dataset)


def _tuned(number: str) -> Callable[[nn.Module, Dataset[Split], Any], Taken]:
    """The state whose example weight is best on validation examples; of equals, nearest to now."""
    sign = -1.0 if number == "loss" else 1.0

    def taken(model: nn.Module, dataset: Dataset[Split], _argument: Any) -> Taken:
        now = _scores(model, dataset.validation)["weight"] or 0.0
        found = dict[float, float]()
        for weight in grid_for([now]):
            nk.set_example_weight(model, weight)
            value = _scores(model, dataset.validation)[number]
            found[weight] = -math.inf if value is None else sign * value
        best = max(found, key=lambda weight: (found[weight], -abs(weight - now)))
        return _weighed(model, dataset, best)

    return taken


def _measured(part: str) -> Callable[[nn.Module, Dataset[Split], Any], Taken]:
    """The state whose statistics are those of a split, as it is at evaluation."""

    def taken(model: nn.Module, dataset: Dataset[Split], _argument: Any) -> Taken:
        nk.recalibrate(model, _Inputs(getattr(dataset, part))).apply()
        return _plain(model, dataset)

    return taken


class _Inputs:
    """Batches of a split's inputs, taken when they are read."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __iter__(self) -> Iterator[Tensor]:
        for part in torch.arange(len(self._split)).split(BATCH_SIZE):
            yield self._split.take(part).inputs


def _disturbed(model: nn.Module, dataset: Dataset[Split], delta: float) -> Taken:
    chosen = set(first_norms(model, NUM_BLOCKS))
    found = []
    for draw in range(1, NUM_DRAWS + 1):
        with nk.disturb_statistics(model, delta, seed=draw, where=lambda _, at: at in chosen):
            found.append(_plain(model, dataset))
    return {split: _mean([taken[split] for taken in found]) for split in SPLITS}


def _mean(several: list[Values]) -> Values:
    found: Values = {}
    for name in several[0]:
        values = [value for each in several if (value := each[name]) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def first_norms(model: nn.Module, num_blocks: int) -> list[str]:
    """Names of the first norm of each of the first residual blocks.

    Raises:
        OptionError: If the network has no residual block.
    """
    layout = find_layout(model)
    names = {norm: several[0] for norm, several in layout.found.items()}
    return [names[block.norms[0]] for block in layout.blocks[:num_blocks]]


STATES: Mapping[str, Callable[[nn.Module, Dataset[Split], Any], Taken]] = MappingProxyType(
    {
        PLAIN: _plain,
        "weight": _weighed,
        "tuned-for-accuracy": _tuned("accuracy"),
        "tuned-for-loss": _tuned("loss"),
        "recalibrated": _measured("train"),
        "test-statistics": _measured("test"),
        "disturbed": _disturbed,
    }
)
WITH_NUMBER = ("weight", "disturbed")


def _numbers(state: str) -> tuple[str, ...]:
    """The numbers of a state, the first one being the default."""
    if state in ANALYSES:
        return ANALYSES[state][1]
    if state == EPOCHS:
        return tuple(OF_EPOCHS)
    _parsed(state)
    return OF_SPLITS


def _parsed(state: str) -> tuple[str, float | None]:
    name, equals, argument = state.partition("=")
    if name not in STATES or bool(equals) != (name in WITH_NUMBER):
        known = [f"{known}=NUMBER" if known in WITH_NUMBER else known for known in STATES]
        known += [EPOCHS, *ANALYSES]
        raise SpecError(
            f"a reading {state!r} was given; the states are {listed(known, len(known))}"
        )
    try:
        return name, float(argument) if equals else None
    except ValueError as error:
        raise SpecError(f"a reading {state!r} was given; after = comes a number") from error
