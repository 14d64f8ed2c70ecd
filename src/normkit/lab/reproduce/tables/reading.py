"""What is read off a trained network besides its test score: how, and which number."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

import normkit as nk
from normkit.convert.placement.blocks import find_layout
from normkit.errors import SpecError
from normkit.inference.tracked import tracked
from normkit.lab.evaluation import WEIGHT, is_share
from normkit.lab.frozen import Frozen
from normkit.lab.records import Outcome
from normkit.lab.reproduce.tables.analyses import ANALYSES, analysed
from normkit.lab.reproduce.tables.subject import Subject, Values
from normkit.lab.task import Held, PartName, Task
from normkit.lab.tasks.classification import Classification
from normkit.layers.base import TrackingLayer
from normkit.text import listed
from normkit.tune.grids import grid_for

Taken = Mapping[str, Values]  # by split
PLAIN = "plain"
EPOCHS = "epochs"
TUNED = "tuned-for-"
SPLITS: tuple[Held, ...] = ("validation", "test")
TRAINING = {"training accuracy": "train_accuracy", "training loss": "train_loss"}
OF_VALIDATION = "validation "
CLASSIFIER = Classification()
NUM_DRAWS, NUM_BLOCKS = 5, 6  # disturbed statistics: Huang et al., Fig. 8
BATCH_SIZES: Mapping[str, int] = MappingProxyType(
    {"detection": 4, "instance-segmentation": 4, "segmentation": 8, "video": 8}
)
BATCH_SIZE = 256  # of small pictures that statistics are measured on


class Reading(Frozen):
    """A number that is read off each trained network.

    It is written as ``STATE``, or as ``STATE: NUMBER``. A state is how the network is evaluated:

    ==================  ================================================================
    plain               as it was trained
    weight=A            with the example weight ``A``
    tuned-for-accuracy  with the example weight that is best on validation examples
    tuned-for-loss      the same by their cross entropy; of other tasks by a score of theirs
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

    Networks without running statistics are evaluated as they were trained. A number is a score of
    the task, the first one by default, or ``weight``, the example weight: for classification
    ``accuracy``, ``loss``, ``top5_accuracy`` and ``weight``. Of ``epochs`` it is
    ``training accuracy``, ``training loss``, or those of validation. Analyses look at 128
    validation examples.

    Args:
        state: How the network is evaluated.
        number: What is taken.

    Example:
        >>> Reading.parse("tuned-for-loss: loss").state
        'tuned-for-loss'
    """

    state: str
    number: str

    @classmethod
    def parse(cls, text: str, task: Task = CLASSIFIER) -> Reading:
        """Read what a preset says of the networks of a task.

        Raises:
            SpecError: If there is no such state or number.
        """
        state, number = state_and_number(text)
        numbers = _numbers(state, task)
        if (number or numbers[0]) not in numbers:
            raise SpecError(
                f"a reading {text!r} was given; the numbers of {state} are "
                f"{listed(numbers, len(numbers))}"
            )
        return cls(state=state, number=number or numbers[0])

    @property
    def is_share(self) -> bool:
        """Whether the number is a share, which tables have in percent."""
        return not self.is_analysis and is_share(self.number)

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
            getattr(epoch, TRAINING[self.number])
            if self.number in TRAINING
            else epoch.validation_scores.get(self.number.removeprefix(OF_VALIDATION))
            for epoch in outcome.epochs
        ]
        finite = [value for value in values if value is not None]
        if outcome.status == "diverged" or not values or len(finite) < len(values):
            return None
        return sum(finite) / len(finite)


def state_and_number(text: str) -> tuple[str, str]:
    """What a preset says of a reading; without a number it is empty."""
    state, _, number = (part.strip() for part in text.partition(":"))
    return state, number


def take(model: nn.Module, subject: Subject, state: str) -> Taken:
    """Evaluate a trained network in a state, on validation and test examples.

    The network is left as it was.

    Args:
        model: The network.
        subject: What it was trained for.
        state: As ``Reading`` has it.

    Raises:
        SpecError: If there is no such state.
    """
    if state in ANALYSES:
        return dict.fromkeys(SPLITS, analysed(model, subject, state))
    name, argument = _parsed(state, subject.task)
    model = copy.deepcopy(model)
    if not tracked(model):
        name, argument = PLAIN, None
    return STATES[name](model, subject, argument)


def _plain(model: nn.Module, subject: Subject, _argument: Any = None) -> Taken:
    return {split: _scores(model, subject, split) for split in SPLITS}


def _scores(model: nn.Module, subject: Subject, split: Held) -> Values:
    found = subject.scores(model, split)
    weights = {m.example_weight for m in model.modules() if isinstance(m, TrackingLayer)}
    return found | {WEIGHT: float(weights.pop()) if len(weights) == 1 else None}


def _weighed(model: nn.Module, subject: Subject, weight: float) -> Taken:
    nk.set_example_weight(model, weight)
    return _plain(model, subject)


def _tuned(model: nn.Module, subject: Subject, number: str) -> Taken:
    """With the example weight that is best on validation examples; of equals, nearest to now."""
    sign = 1.0 if is_share(number) else -1.0
    now = _scores(model, subject, "validation")[WEIGHT] or 0.0
    found = dict[float, float]()
    for weight in grid_for([now]):
        nk.set_example_weight(model, weight)
        value = _scores(model, subject, "validation").get(number)
        found[weight] = -math.inf if value is None else sign * value
    best = max(found, key=lambda weight: (found[weight], -abs(weight - now)))
    return _weighed(model, subject, best)


def _measured(part: PartName) -> Callable[[nn.Module, Subject, Any], Taken]:
    """The state whose statistics are those of a part, as it is at evaluation."""

    def taken(model: nn.Module, subject: Subject, _argument: Any) -> Taken:
        nk.recalibrate(model, _Batches(subject, part)).apply()
        return _plain(model, subject)

    return taken


class _Batches:
    """Batches of a part, taken when they are read."""

    def __init__(self, subject: Subject, part: PartName) -> None:
        self._subject = subject
        self._part: PartName = part

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        size = BATCH_SIZES.get(self._subject.task.name, BATCH_SIZE)
        return self._subject.batches(self._part, size)


def _disturbed(model: nn.Module, subject: Subject, delta: float) -> Taken:
    chosen = set(first_norms(model, NUM_BLOCKS))
    found = []
    for draw in range(1, NUM_DRAWS + 1):
        with nk.disturb_statistics(model, delta, seed=draw, where=lambda _, at: at in chosen):
            found.append(_plain(model, subject))
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


STATES: Mapping[str, Callable[[nn.Module, Subject, Any], Taken]] = MappingProxyType(
    {
        PLAIN: _plain,
        WEIGHT: _weighed,
        TUNED: _tuned,
        "recalibrated": _measured("train"),
        "test-statistics": _measured("test"),
        "disturbed": _disturbed,
    }
)
WITH_NUMBER = (WEIGHT, "disturbed")


def _scores_of(task: Task) -> tuple[str, ...]:
    return (*task.scores, *task.further)


def _numbers(state: str, task: Task) -> tuple[str, ...]:
    """The numbers of a state, the first one being the default."""
    if state in ANALYSES:
        return ANALYSES[state][1]
    if state == EPOCHS:
        return (*TRAINING, *(f"{OF_VALIDATION}{name}" for name in _scores_of(task)))
    _parsed(state, task)
    return (*_scores_of(task), WEIGHT)


def _parsed(state: str, task: Task) -> tuple[str, Any]:
    """The name of a state in ``STATES``, and its argument."""
    tuned = [f"{TUNED}{name}" for name in _scores_of(task)]
    if state in tuned:
        return TUNED, state.removeprefix(TUNED)
    name, equals, argument = state.partition("=")
    if name == TUNED or name not in STATES or bool(equals) != (name in WITH_NUMBER):
        _refuse(state, tuned)
    try:
        return name, float(argument) if equals else None
    except ValueError as error:
        raise SpecError(f"a reading {state!r} was given; after = comes a number") from error


def _refuse(state: str, tuned: Sequence[str]) -> None:
    known = [f"{name}=NUMBER" if name in WITH_NUMBER else name for name in STATES]
    at = known.index(TUNED)
    known = [*known[:at], *tuned, *known[at + 1 :], EPOCHS, *ANALYSES]
    raise SpecError(f"a reading {state!r} was given; the states are {listed(known, len(known))}")
