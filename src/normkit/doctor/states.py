"""Score one model with several statistics: its own, newly measured ones, and each batch's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.doctor.judge import Judge, Scores, Values, at_evaluation, temporary_statistics
from normkit.errors import InputError, PartitionError
from normkit.inference import recalibrate, thaw_statistics
from normkit.inference.norm_inputs import ignore, watch_inputs
from normkit.inference.patch import PatchedLayer, StatisticsPatch
from normkit.inference.tracked import tracked
from normkit.layers.base import is_estimated
from normkit.passes import Forward, arguments_of, device_of, forward_batch, moved

Rows = Mapping[str, PatchedLayer]
"""Layers by name, each with its old statistics and those that were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A model, its data, and the judge that scores it.

    Args:
        model: The model, without wrappers.
        train: Training batches.
        judge: Holds the test batches, and scores states of the model on them.
        forward: ``forward(model, batch)`` calls the model.
        batch_size: Examples of a training batch.
        checkpoints: Earlier state dicts by name, the oldest first.
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

    def example(self) -> Any:
        """The model's arguments for the first training batch; None if ``forward=`` is given."""
        if self.forward is not forward_batch:
            return None
        args, named = arguments_of(self.model, moved(self.train[0], device_of(self.model)))
        return named or (args[0] if len(args) == 1 else args)

    def as_it_is(self) -> Scores:
        """Score the model in evaluation mode."""
        with at_evaluation(self.model):
            return self.judge.scores(self.model, "judging the model as it is")

    def with_statistics(self, values: Values, what: str) -> Scores:
        """Score the model with other running statistics."""
        with temporary_statistics(self.model, values):
            return self.judge.scores(self.model, what)

    def adapted(self) -> Scores:
        """Score each half of the test data with the statistics of the other half's inputs."""
        found = list[Scores]()
        for half, other in enumerate(reversed(self.judge.halves)):
            with temporary_statistics(self.model, new_values(rows_of(self.measure(other)))):
                found.append(self.judge.scores(self.model, "judging test statistics", half))
        return found[0].then(found[1])

    def by_batch(self) -> Scores | str:
        """Score the model with each test batch's own statistics, or say why that is impossible."""
        if self.judge.is_single:
            return "the losses of a detector are taken of one picture at a time, and not of a batch"
        with at_evaluation(self.model), ExitStack() as stack:
            for layer in tracked(self.model).values():
                stack.enter_context(watch_inputs(layer, ignore, by_batch=True))
            try:
                return self.judge.scores(self.model, "judging by each batch's statistics")
            except ValueError as error:  # A batch with a single value has no variance.
                return str(error)

    def measure(self, batches: Sequence[Any], forward: Forward | None = None) -> StatisticsPatch:
        """Measure the population statistics of all layers that have some, frozen layers too.

        One pass measures all layers where that is possible. Micro-batch norms normalise by
        estimates that may be wrong, so layers behind them must be measured after them.
        """
        model, send = self._thawed_copy(), forward or self.forward
        if self.in_order:
            return recalibrate(model, batches, forward=send, sequential=True)
        try:
            return recalibrate(model, batches, forward=send)
        except (InputError, PartitionError):  # A batch with a single value has no variance.
            return recalibrate(model, batches, forward=send, sequential=True)

    @property
    def in_order(self) -> bool:
        """Whether the layers must be measured one after the other."""
        return any(map(is_estimated, self.model.modules()))

    def _thawed_copy(self) -> nn.Module:
        """Copy the model, and let every norm of the copy follow its input."""
        with at_evaluation(self.model):
            model = copy.deepcopy(self.model).eval()
        thaw_statistics(model)
        for layer in tracked(model).values():
            # ``recalibrate`` leaves layers with momentum 0 out, as frozen; the value has no effect.
            if getattr(layer, "momentum", None) == 0:
                setattr(layer, "momentum", 0.1)  # noqa: B010 - torch types modules' attributes
            # For torch's instance norms this flag changes what evaluation computes.
            if not isinstance(layer, _InstanceNorm):
                setattr(layer, "track_running_stats", True)  # noqa: B010
        return model


def with_dropout(forward: Forward) -> Forward:
    """Return a forward function in which the model's dropout layers drop, as in training."""

    def send(model: nn.Module, batch: Any) -> Any:
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
    """Whether this module drops values in training: dropout, or drop path (timm, torchvision)."""
    rates = (getattr(module, name, None) for name in ("p", "drop_prob"))
    class_name = type(module).__name__.lower()
    return ("drop" in class_name or "stochasticdepth" in class_name) and any(rates)


def new_values(rows: Rows) -> Values:
    """The measured statistics of each layer."""
    return {name: row.new for name, row in rows.items()}


def distance(old: Mapping[str, Tensor], new: Mapping[str, Tensor], eps: float) -> float:
    r"""Squared distance of statistics in new standard deviations, both moments together.

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
    """Index the layers of a patch by their names."""
    return {row.name: row for row in patch.layers}
