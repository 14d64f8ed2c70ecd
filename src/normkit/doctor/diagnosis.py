"""The doctor's report: states of the model, causes, layers and tried fixes; prints as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from normkit.diagnostics import ChannelDifference, EstimationShift, InactiveChannels
from normkit.diagnostics.measurement import Measurement
from normkit.text import module_name, table_lines
from normkit.tune.gain import Gain

SMALLEST_SHARE = 0.05
"""A cause explains at least this share of the loss; a smaller gain is no cause, even if certain."""
SHOWN = 8  # layers in the printed table


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The test loss of the model in one state.

    Args:
        name: Which statistics the norms use in this state.
        loss: Mean loss over the test examples.
        accuracy: Share of right classes; None if the loss is not the cross entropy.
        gain: How much smaller each example's loss is than with the model as it is.
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
        why: Why that makes the loss larger.
        fix: The calls that mend it.
        layers: Names of the layers with this cause; empty if it lies in the model or the data.
        explains: How much smaller the loss is without this cause.
        share: The mean of ``explains``, divided by the loss of the model as it is.
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
        kind: The name of its class.
        mean_shift: Distance of the running means from the training data's, in running standard
            deviations; None for layers that could not be measured.
        std_low: Smallest ratio of the training data's standard deviations to the running ones.
        std_high: Largest such ratio.
        esm_mean: Estimation shift of its means on the test data.
        esm_std: Estimation shift of its standard deviations on the test data.
        esm_std_recalibrated: ``esm_std`` with statistics measured anew on the training data.
        returns: Loss that comes back when this layer alone keeps its old statistics and all others
            have new ones; None if new statistics do not make the loss smaller.
        cause: The symptom of its wrong statistics; None if they are right.
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
        num_seeds: Number of random draws.
        loss: Mean of the loss over the draws.
        spread: Standard deviation of the loss over the draws.
    """

    delta: float
    num_seeds: int
    loss: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A fix that was tried on a copy of the model.

    Args:
        name: What was done.
        call: The call that does it.
        loss: Mean loss after the fix; None if the fix was impossible.
        accuracy: Share of right classes after the fix.
        gain: How much smaller each example's loss became, on examples that the fix did not use.
        note: What to know about the result, or why the fix was impossible.
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
        name: The checkpoint's name, or ``"now"``.
        shift: Its estimation shift on the test data.
    """

    name: str
    shift: EstimationShift


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Measurement):
    """Why a model evaluates badly, and which fixes help.

    Args:
        num_train: Number of training examples that were read.
        num_judged: Number of test examples that the losses are means of.
        batch_size: Examples of a training batch.
        states: The test loss of the model as it is, then with other statistics.
        causes: The causes, the one that explains most first; empty if nothing is wrong.
        layers: The layers with running statistics, in the order of the forward.
        shift: Estimation shift on the test data of the model as it is.
        over_training: Estimation shift at earlier checkpoints and now; empty without checkpoints.
        sensitivity: Loss with disturbed statistics.
        channel_difference: StatDiff; None without a norm that pools channels.
        inactive_channels: Dead channels; None without a ReLU.
        findings: Problems that ``nk.validate`` finds at the training batch size, as text.
        trials: The fixes that were tried.
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
        """The main cause, in one sentence."""
        loss = self.states[0].loss
        if len(self.states) == 1:
            return f"There are no running statistics that could be wrong: the loss is {loss:.4g}."
        if not self.causes:
            return (
                f"Nothing wrong with the norms' statistics: the test loss with them is "
                f"{loss:.4g}; {self._best_alternative()}."
            )
        first = self.causes[0]
        return (
            f"{first.name[0].upper()}{first.name[1:]}: {first.what}; that explains "
            f"{first.explains.mean:.3g} of the test loss of {loss:.4g} ({100 * first.share:.0f} %)."
        )

    def _best_alternative(self) -> str:
        """Say how much other statistics would gain, if nothing is wrong."""
        best = max(self.states, key=lambda state: state.gain.mean)
        if best.gain.mean < SMALLEST_SHARE * abs(self.states[0].loss):
            return "no other statistics make it smaller by more than a twentieth"
        verdict = "which is too little for a fault"
        if not best.gain.significant:
            verdict = "which may be chance: more test data would tell"
        return f"with those {best.name} it is {best.gain.mean:.3g} smaller, {verdict}"

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
        head = ["name", "loss that returns", "mean shift", "std ratio", "symptom"]
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
