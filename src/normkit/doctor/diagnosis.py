"""What the doctor found: states, causes, layers and what was tried; prints as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from normkit.diagnostics import ChannelDifference, EstimationShift, InactiveChannels
from normkit.diagnostics.measurement import Measurement
from normkit.text import module_name, table_lines
from normkit.tune.gain import Gain

SMALLEST_SHARE = 0.05
"""Of the loss: what explains less is no cause, however sure it is."""
SHOWN = 8  # layers in the printed table


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The model in one state, on the test examples that judge.

    Args:
        name: Which state.
        loss: Mean loss.
        accuracy: Share of right classes, if the loss is the cross entropy.
        gain: What each example's loss has lost against the model as it is.
    """

    name: str
    loss: float
    accuracy: float | None
    gain: Gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Something that makes the evaluation bad.

    Args:
        name: What it is called.
        what: What was found, with numbers.
        why: What it does.
        fix: The way out.
        layers: The layers it is about; empty if it is about the model or the data.
        explains: Loss that goes away without it.
        share: Of the model's loss as it is.
    """

    name: str
    what: str
    why: str
    fix: str
    layers: tuple[str, ...]
    explains: Gain
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer with running statistics.

    Args:
        name: Its name.
        kind: Its class.
        mean_shift: Distance of the running means from the training data's, in running standard
            deviations; None for layers that could not be measured.
        std_low: Smallest ratio of the training data's standard deviations to the running ones.
        std_high: Largest ratio.
        esm_mean: Estimation shift of its means on the test data.
        esm_std: Estimation shift of its standard deviations.
        esm_std_recalibrated: The same with statistics measured anew on the training data.
        returns: Loss that comes back when this layer alone keeps its old statistics and all others
            have new ones; None where new ones gain nothing.
        cause: The sign that it shows, if statistics were found to be wrong.
    """

    name: str
    kind: str
    mean_shift: float | None
    std_low: float | None
    std_high: float | None
    esm_mean: float | None
    esm_std: float | None
    esm_std_recalibrated: float | None
    returns: float | None
    cause: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Loss with disturbed running statistics.

    Args:
        delta: Largest relative error of means and variances.
        num_seeds: Draws.
        loss: Mean over the draws.
        spread: Standard deviation over the draws.
    """

    delta: float
    num_seeds: int
    loss: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A fix that was tried on a copy.

    Args:
        name: What was done.
        call: The call that does it.
        loss: Mean loss after it; None if it could not be done.
        accuracy: Share of right classes after it.
        gain: What each example's loss has lost, on examples that had no part in it.
        note: What to know about it, or why it could not be done.
    """

    name: str
    call: str
    loss: float | None
    accuracy: float | None
    gain: Gain | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AtCheckpoint:
    """Estimation shift of an earlier state of the model, or of the model now.

    Args:
        name: Of the checkpoint.
        shift: On the test data.
    """

    name: str
    shift: EstimationShift


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Measurement):
    """What is wrong with an evaluation, and what helps.

    Args:
        num_train: Training examples that were looked at.
        num_judged: Test examples that judged.
        batch_size: Examples of a training batch.
        states: The model as it is, and in other states.
        causes: What is wrong, the one that explains most first; empty if nothing is.
        layers: In the order of the forward.
        shift: Estimation shift on the test data as the model is.
        over_training: The same at earlier checkpoints and now; empty without checkpoints.
        sensitivity: Loss with disturbed statistics.
        channel_difference: StatDiff; None without a norm that pools channels.
        inactive_channels: Dead channels; None without a ReLU.
        findings: What ``nk.validate`` says at the training batch size, as text.
        trials: What was tried.
        notes: What could not be measured, and why.
    """

    num_train: int
    num_judged: int
    batch_size: int
    states: tuple[State, ...]
    causes: tuple[Cause, ...]
    layers: tuple[LayerReport, ...]
    shift: EstimationShift | None
    over_training: tuple[AtCheckpoint, ...]
    sensitivity: tuple[Sensitivity, ...]
    channel_difference: ChannelDifference | None
    inactive_channels: InactiveChannels | None
    findings: tuple[str, ...]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]

    drawn = ("esm_std", "esm_std_recalibrated")

    @property
    def reading(self) -> str:
        """What is wrong, in one sentence."""
        loss = self.states[0].loss
        if len(self.states) == 1:
            return f"There are no running statistics that could be wrong: the loss is {loss:.4g}."
        if not self.causes:
            return (
                f"Nothing wrong with the norms' statistics: the test loss is {loss:.4g} by them; "
                f"{self._best()}."
            )
        first = self.causes[0]
        return (
            f"{first.name[0].upper()}{first.name[1:]}: {first.what}; that explains "
            f"{first.explains.mean:.3g} of the test loss of {loss:.4g} ({100 * first.share:.0f} %)."
        )

    def _best(self) -> str:
        """What other statistics would gain, where nothing is wrong."""
        best = max(self.states, key=lambda state: state.gain.mean)
        if best.gain.mean < SMALLEST_SHARE * abs(self.states[0].loss):
            return "no others make it smaller by more than a twentieth"
        chance = "less than counts as a fault"
        if not best.gain.significant:
            chance = "which may be chance: more test data would tell"
        return f"with those {best.name} it is {best.gain.mean:.3g} smaller, {chance}"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield self.reading
        for number, cause in enumerate(self.causes, start=1):
            yield f"{number}. {cause.name}: explains {cause.explains}"
            yield from (f"   {label}: {getattr(cause, label)}" for label in ("what", "why", "fix"))
        yield f"on {self.num_judged:,} test examples"
        yield from table_lines(_state_rows(self.states))
        yield from _titled("layers whose statistics cost most", self._layer_rows())
        yield from _titled("tried on copies, gains on the same examples", self._trial_rows())
        yield from _titled(
            "loss with means and variances scaled by random factors from 1 - delta to 1 + delta",
            self._sensitivity_rows(),
        )
        measures = (self.shift, self.channel_difference, self.inactive_channels)
        yield from (measure.reading for measure in measures if measure is not None)
        yield from self.findings
        yield from (f"not measured: {note}" for note in self.notes)

    def _layer_rows(self) -> list[list[str]]:
        rows = [row for row in self.layers if row.returns is not None]
        rows.sort(key=lambda row: -(row.returns or 0.0))
        head = ["name", "loss that returns", "mean shift", "std ratio", "sign"]
        return [
            head,
            *(
                [
                    module_name(row.name),
                    f"{row.returns:+.4g}",
                    f"{row.mean_shift:.3g}",
                    f"{row.std_low:.3g} to {row.std_high:.3g}",
                    row.cause or "-",
                ]
                for row in rows[:SHOWN]
            ),
        ]

    def _trial_rows(self) -> list[list[str]]:
        rows = [
            [
                trial.name,
                "-" if trial.loss is None else f"{trial.loss:.4g}",
                _share(trial.accuracy),
                "-" if trial.gain is None else _gain(trial.gain),
                trial.note,
            ]
            for trial in self.trials
        ]
        return [["tried", "loss", "accuracy", "gain", "note"], *rows]

    def _sensitivity_rows(self) -> list[list[str]]:
        rows = [
            [f"{each.delta:g}", f"{each.loss:.4g} ± {each.spread:.2g}", str(each.num_seeds)]
            for each in self.sensitivity
        ]
        return [["delta", "loss", "draws"], *rows]


def _state_rows(states: tuple[State, ...]) -> list[list[str]]:
    rows = [
        [state.name, f"{state.loss:.4g}", _share(state.accuracy), _gain(state.gain)]
        for state in states
    ]
    return [["statistics", "loss", "accuracy", "gain"], *rows]


def _titled(title: str, rows: list[list[str]]) -> Iterator[str]:
    if len(rows) > 1:
        yield title
        yield from table_lines(rows)


def _share(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def _gain(gain: Gain) -> str:
    return f"{gain.mean:+.4g} ({gain.low:+.4g} to {gain.high:+.4g})"
