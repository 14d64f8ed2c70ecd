"""A run that a user's own function trains: any task, any framework."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from normkit import convert_norm_
from normkit.errors import DataError, SpecError
from normkit.lab.arms import Arm
from normkit.lab.loggers import Loggers
from normkit.lab.records import Outcome
from normkit.lab.slots import PlacedNorm
from normkit.lab.spec import TrainingSpec
from normkit.lab.user_code import load_function
from normkit.text import shortened

SCORE = "score"  # what a single number is called
ARGUMENTS = ("apply_norm", "batch_size", "seed", "report")  # what the function is given, in order


def training_function(name: str) -> Callable[..., Any]:
    """The function that ``--train`` names.

    Raises:
        SpecError: If it is not there, or cannot be called with what a run gives it.
    """
    function = load_function(name, "--train")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function that does not say what it takes
        return function
    try:
        signature.bind(*ARGUMENTS)
    except TypeError as error:
        raise SpecError(
            f"{name} takes {signature}, but it is called with {', '.join(ARGUMENTS)}, in this "
            f"order; give it these four arguments"
        ) from error
    return function


class ApplyNorm:
    """Puts the run's norm into a network; the function is given one and calls it.

    A function that builds its network in another way, or in another framework, reads ``spec``.

    Args:
        run: Says which norm, and for which batch size.
    """

    def __init__(self, run: TrainingSpec) -> None:
        self._arm = Arm.parse(run.norm).at(run.batch_size)
        self._batch_size = run.batch_size
        self.is_used = False
        self.placed: tuple[PlacedNorm, ...] = ()
        self.num_parameters: int | None = None

    @property
    def spec(self) -> str:
        """The run's norm or arm as text, such as ``"gn:8"``, for a function that places it."""
        self.is_used = True
        return str(self._arm)

    def __call__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        example_input: Any = None,
    ) -> nn.Module:
        """Replace the norms of a network in place, in all modules inside of it.

        Args:
            model: The network, such as a ``LightningModule`` or a model of transformers, or a
                function without arguments that makes it. Make its optimizer afterwards.
            example_input: What it is called with: a tuple of arguments, a dict of named ones, or
                the only one. Arms that are not one norm throughout need it, such as ``xbn/gn:64``
                and ``gn:8+ws``, and so does ``auto``.

        Returns:
            The network.

        Raises:
            NormError: If the norm does not fit.
        """
        network = _network(model)
        if example_input is None and not self._arm.is_plain:
            raise DataError(
                f"{self._arm} is placed by how the network is connected; call "
                f"apply_norm(model, example_input) with an input"
            )
        if example_input is None:
            norms = self._arm.replaced(network, type(network).__name__)
            convert_norm_(
                network, dict.fromkeys(norms, str(self._arm)), batch_size=self._batch_size
            )
        else:
            options = {"batch_size": self._batch_size, "example_input": example_input}
            self.placed = self._arm.apply_(network, **options).norms
        self.is_used = True
        self.num_parameters = sum(p.numel() for p in network.parameters())
        return network


def _network(given: object) -> nn.Module:
    """A network, or what a function that makes it gives."""
    made = given() if callable(given) and not isinstance(given, nn.Module) else given
    if not isinstance(made, nn.Module):
        what = "" if made is given else "a function that returned "
        raise DataError(
            f"apply_norm was given {what}{shortened(repr(made))}; give it an nn.Module, or a "
            f"function that makes one; a network of another kind is built with the norm that "
            f"apply_norm.spec names"
        )
    return made


class Report:
    """Counts the steps of a user's training, and sends numbers to the loggers.

    Args:
        name: Of the training function, for error messages.
        on_step: Is called at each step.
        loggers: Get the numbers.
    """

    def __init__(self, name: str, on_step: Callable[[], object], loggers: Loggers) -> None:
        self._name, self._on_step, self._loggers = name, on_step, loggers
        self.num_steps = 0

    def __call__(self, **values: float) -> None:
        """Count a step, and log what was found in it.

        Args:
            values: Numbers by name.

        Raises:
            DataError: If one of them is no number.
        """
        self.num_steps += 1
        self._on_step()
        if values:
            self.log_metrics(values, self.num_steps)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step and count none, as ``nk.Probe(net, writer=report)`` does.

        Args:
            values: Numbers by name.
            step: Counted from 1.

        Raises:
            DataError: If one of them is no number.
        """
        self._loggers.log_metrics(_numbers(values, self._name), step)


def train_by(
    spec: TrainingSpec, on_step: Callable[[], object], loggers: Loggers | None = None
) -> Outcome:
    """Let the user's function train, and read what it returns.

    The function is called as ``train(apply_norm, batch_size, seed, report)``, with an
    :class:`ApplyNorm` and a :class:`Report`. It returns a number, or a dict of numbers by name, of
    which the first is judged; they go to the loggers too. A number that is not finite is a run that
    diverged.

    Raises:
        DataError: If it returns something else, or takes no notice of the norm.
    """
    name, loggers = spec.protocol.train or "", loggers or Loggers()
    function = training_function(name)
    apply_norm, report = ApplyNorm(spec), Report(name, on_step, loggers)
    scores = _scores(function(apply_norm, spec.batch_size, spec.seed, report), name)
    if not apply_norm.is_used:
        raise DataError(
            f"{name} never called apply_norm(model) and never read apply_norm.spec, so every norm "
            f"would train the same network; call apply_norm on the network before the optimizer is "
            f"made, or build the network with the norm that apply_norm.spec names"
        )
    loggers.log_metrics(scores, report.num_steps)
    finite = all(map(math.isfinite, scores.values()))
    return Outcome(
        status="finished" if finite else "diverged",
        message=None if finite else f"the scores were {scores}; they have to be finite",
        scores=scores if finite else {},
        norms=apply_norm.placed,
        num_parameters=apply_norm.num_parameters,
        num_steps=report.num_steps,
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
