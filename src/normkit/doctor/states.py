"""States of one model: as it is, with statistics measured anew, and normalised by each batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.doctor.judge import Judge, Scores, Values, at_evaluation, with_statistics
from normkit.errors import InputError, PartitionError
from normkit.inference import recalibrate, thaw_statistics
from normkit.inference.patch import PatchedLayer, StatisticsPatch
from normkit.inference.reaching import ignore, reaching
from normkit.inference.tracked import tracked
from normkit.layers.base import is_estimated
from normkit.passes import Forward, arguments_of, device_of, forward_batch, moved

Rows = Mapping[str, PatchedLayer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A model, its data, and who judges.

    Args:
        model: The model, without wrappers.
        train: Training batches.
        judge: Has the test batches, and scores states of the model on them.
        forward: How a batch goes through the model.
        batch_size: Examples of a training batch.
        checkpoints: Earlier states by name, the oldest first.
    """

    model: nn.Module
    train: Sequence[Any]
    judge: Judge
    forward: Forward
    batch_size: int
    checkpoints: Mapping[str, Mapping[str, Tensor]]

    @property
    def test(self) -> list[Any]:
        """All test batches."""
        return [*self.judge.halves[0], *self.judge.halves[1]]

    def example(self) -> Any:  # noqa: ANN401 - whatever the model takes
        """What the model is called with for the first training batch; None if nobody knows."""
        if self.forward is not forward_batch:
            return None
        args, named = arguments_of(self.model, moved(self.train[0], device_of(self.model)))
        return named or (args[0] if len(args) == 1 else args)

    def as_it_is(self) -> Scores:
        """Score the model at evaluation."""
        with at_evaluation(self.model):
            return self.judge.scores(self.model, "judging the model as it is")

    def with_statistics(self, values: Values, what: str) -> Scores:
        """Score it with other running statistics."""
        with with_statistics(self.model, values):
            return self.judge.scores(self.model, what)

    def adapted(self) -> Scores:
        """Score each half with the statistics of the other half's inputs."""
        found = list[Scores]()
        for half, other in enumerate(reversed(self.judge.halves)):
            with with_statistics(self.model, new_values(rows_of(self.measure(other)))):
                found.append(self.judge.scores(self.model, "judging test statistics", half))
        return found[0].then(found[1])

    def by_batch(self) -> Scores | str:
        """Score it with every norm normalising by each test batch; or say why that cannot be."""
        with at_evaluation(self.model), ExitStack() as stack:
            for layer in tracked(self.model).values():
                stack.enter_context(reaching(layer, ignore, by_batch=True))
            try:
                return self.judge.scores(self.model, "judging by each batch's statistics")
            except ValueError as error:  # a batch of one value
                return str(error)

    def measure(self, batches: Sequence[Any], forward: Forward | None = None) -> StatisticsPatch:
        """Measure the population statistics of all layers that have some, frozen ones too.

        In one pass where that can be: micro-batch norms normalise by estimates that may be wrong,
        so that what follows them is measured after they are.
        """
        model, send = self._thawed(), forward or self.forward
        if self.in_order:
            return recalibrate(model, batches, forward=send, sequential=True)
        try:
            return recalibrate(model, batches, forward=send)
        except (InputError, PartitionError):  # a batch of a single value
            return recalibrate(model, batches, forward=send, sequential=True)

    @property
    def in_order(self) -> bool:
        """Whether layers have to be measured one after the other."""
        return any(map(is_estimated, self.model.modules()))

    def _thawed(self) -> nn.Module:
        """Copy the model, with statistics that can be measured."""
        with at_evaluation(self.model):
            model = copy.deepcopy(self.model).eval()
        thaw_statistics(model)
        for layer in tracked(model).values():
            if getattr(layer, "momentum", None) == 0:
                setattr(layer, "momentum", 0.1)  # noqa: B010 - torch types modules' attributes
            if not isinstance(layer, _InstanceNorm):  # which evaluate otherwise when it is on
                setattr(layer, "track_running_stats", True)  # noqa: B010
        return model


def with_dropout(forward: Forward) -> Forward:
    """Send batches through a model whose dropout layers drop, as in training."""

    def send(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
        drops = [module for module in model.modules() if is_dropout(module)]
        for module in drops:
            module.training = True
        try:
            return forward(model, batch)
        finally:
            for module in drops:
                module.training = False

    return send


def is_dropout(module: nn.Module) -> bool:
    """Whether this drops values in training: torch's dropouts, timm's and torchvision's paths."""
    rates = (getattr(module, name, None) for name in ("p", "drop_prob"))
    named = type(module).__name__.lower()
    return ("drop" in named or "stochasticdepth" in named) and any(rates)


def new_values(rows: Rows) -> Values:
    """What was measured."""
    return {name: row.new for name, row in rows.items()}


def distance(old: Mapping[str, Tensor], new: Mapping[str, Tensor], eps: float) -> float:
    r"""Distance of statistics, in standard deviations, for both moments together.

    .. math:: \frac{1}{C} \sum_c \frac{(\mu_c - m_c)^2}{v_c + \epsilon}
              + \Bigl(\tfrac12 \log \frac{\sigma^2_c + \epsilon}{v_c + \epsilon}\Bigr)^2
    """
    mean, var = (
        [side[name].double().cpu() for side in (old, new)]
        for name in ("running_mean", "running_var")
    )
    shift = (mean[0] - mean[1]).square() / (var[1] + eps)
    ratio = ((var[0] + eps) / (var[1] + eps)).log() / 2
    return torch.nan_to_num(shift + ratio.square(), nan=torch.inf).mean().item()


def rows_of(patch: StatisticsPatch) -> Rows:
    """The layers of a patch by name."""
    return {row.name: row for row in patch.layers}
