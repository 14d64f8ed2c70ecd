"""A run that a user's own function trains: any task, any framework."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from normkit import convert_norm_
from normkit.errors import DataError
from normkit.lab.arms import Arm
from normkit.lab.loggers import Logger
from normkit.lab.records import Outcome
from normkit.lab.slots import PlacedNorm
from normkit.lab.spec import TrainingSpec
from normkit.lab.user_code import load_function
from normkit.text import shortened

SCORE = "score"  # what a single number is called


class ApplyNorm:
    """Puts the run's norm into a network; the function is given one and calls it.

    Args:
        spec: Says which norm, and for which batch size.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        self._arm = Arm.parse(spec.norm).at(spec.batch_size)
        self._batch_size = spec.batch_size
        self.placed: tuple[PlacedNorm, ...] = ()
        self.num_parameters: int | None = None

    def __call__(
        self,
        model: nn.Module,
        example_input: Any = None,
    ) -> nn.Module:
        """Replace the norms of a network in place.

        Args:
            model: The network; make its optimizer afterwards.
            example_input: What it is called with. Arms that are not one norm throughout need it,
                such as ``xbn/gn:64`` and ``gn:8+ws``, and so does ``auto``.

        Returns:
            The network.

        Raises:
            NormError: If the norm does not fit.
        """
        if example_input is None and self._arm.is_plain:
            convert_norm_(model, str(self._arm), batch_size=self._batch_size)
        elif example_input is None:
            raise DataError(
                f"{self._arm} is placed by how the network is connected; call "
                f"apply_norm(model, example_input) with an input"
            )
        else:
            options = {"batch_size": self._batch_size, "example_input": example_input}
            self.placed = self._arm.apply_(model, **options).norms
        self.num_parameters = sum(p.numel() for p in model.parameters())
        return model


def train_by(
    spec: TrainingSpec, on_step: Callable[[], object], loggers: Sequence[Logger] = ()
) -> Outcome:
    """Let the user's function train, and read what it returns.

    The function is called as ``train(apply_norm, batch_size, seed, report)``. ``report()`` counts
    a step for the display; numbers given to it by name, ``report(loss=0.5)``, go to the loggers,
    as the scores do at the end. It returns a number, or a dict of numbers by name, of which the
    first is judged. A number that is not finite is a run that diverged.

    Raises:
        DataError: If it returns something else.
    """
    function = load_function(spec.protocol.train or "", "--train")
    apply_norm, num_steps = ApplyNorm(spec), 0

    def report(**values: float) -> None:
        nonlocal num_steps
        num_steps += 1
        on_step()
        if values and loggers:
            numbers = _numbers(values, spec.protocol.train or "")
            for logger in loggers:
                logger.log_metrics(numbers, num_steps)

    returned = function(apply_norm, spec.batch_size, spec.seed, report)
    scores = _scores(returned, spec.protocol.train or "")
    if apply_norm.num_parameters is None:
        raise DataError(
            f"{spec.protocol.train} never called apply_norm(model), so every norm would train the "
            f"same network; call it on the network before the optimizer is made"
        )
    for logger in loggers:
        logger.log_metrics(scores, num_steps)
    finite = all(map(math.isfinite, scores.values()))
    return Outcome(
        status="finished" if finite else "diverged",
        message=None if finite else f"the scores were {scores}; they have to be finite",
        scores=scores if finite else {},
        norms=apply_norm.placed,
        num_parameters=apply_norm.num_parameters,
        num_steps=num_steps,
    )


def _numbers(given: Mapping[str, object], name: str) -> dict[str, float]:
    """What ``report`` was given, for the loggers."""
    try:
        return {key: float(value) for key, value in given.items()}  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        said = shortened(repr(given))
        raise DataError(f"report(...) in {name} was given {said}; give it numbers") from error


def _scores(returned: object, name: str) -> dict[str, float]:
    found = returned if isinstance(returned, Mapping) else {SCORE: returned}
    try:
        scores = {str(key): float(value) for key, value in found.items()}  # type: ignore[arg-type]
    except (TypeError, ValueError):
        scores = {}
    if not scores:
        raise DataError(
            f"{name} returned {type(returned).__name__}; it returns a number such as an accuracy, "
            f"or a dict of numbers by name, of which the first is judged"
        )
    return scores
