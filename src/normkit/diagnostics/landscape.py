"""Measure the loss landscape and gradient predictiveness, by one of two protocols."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from normkit.core.check import require_choice
from normkit.diagnostics.lipschitz import Loss, cross_entropy_of_pairs
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.errors import OptionError
from normkit.passes import (
    Forward,
    as_list,
    attempt,
    changes_nothing,
    device_of,
    forward_batch,
    moved,
    progress,
    untouched,
    unwrap,
)

Protocol = Literal["along_gradient", "multi_lr"]
Params = Callable[[str, nn.Parameter], bool]
RATES: dict[Protocol, tuple[float, ...]] = {
    "along_gradient": (0.1, 0.2, 0.3, 0.4, 0.5),
    "multi_lr": (1e-4, 2e-4, 3e-4, 4e-4, 5e-4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Losses and gradients of one step, over all rates.

    Args:
        name: The step's number, from 1.
        min_loss: Smallest loss.
        max_loss: Largest loss.
        loss_range: ``max_loss - min_loss``.
        min_gradient_change: Smallest distance between two gradients.
        max_gradient_change: Largest such distance.
        effective_smoothness: Largest ratio of the gradients' distance to the length of the step;
            None for ``"multi_lr"``.
    """

    name: int
    min_loss: float
    max_loss: float
    loss_range: float
    min_gradient_change: float | None
    max_gradient_change: float | None
    effective_smoothness: float | None


@dataclass(frozen=True, kw_only=True)
class GradientLandscape(Measurement):
    """How losses and gradients change with the length of a step.

    Args:
        protocol: ``"along_gradient"`` or ``"multi_lr"``.
        rates: Multiples of the gradient, or learning rates.
        num_parameters: Number of values in the chosen parameters.
        steps: A row for each batch.
    """

    protocol: Protocol
    rates: tuple[float, ...]
    num_parameters: int
    steps: tuple[Step, ...]

    drawn = ("loss_range", "max_gradient_change")

    @property
    def reading(self) -> str:
        """How much the loss and the gradient change, on average."""
        return read_finite_rows(self.steps, self._read)

    def _read(self, steps: Sequence[Step]) -> str:
        loss = sum(step.loss_range for step in steps) / len(steps)
        changes = [s.max_gradient_change for s in steps if s.max_gradient_change is not None]
        gradient = f"{sum(changes) / len(changes):.3g}" if changes else "-"
        return (
            f"Over {len(steps)} steps ({self.protocol}, rates {min(self.rates):g} to "
            f"{max(self.rates):g}) the loss ranges over {loss:.3g} and the gradient changes by up "
            f"to {gradient}, on average."
        )


@changes_nothing
def gradient_landscape(  # noqa: PLR0913 - the protocol, and what it is applied to
    model: nn.Module,
    batches: Iterable[Any],
    *,
    protocol: Protocol = "along_gradient",
    rates: Sequence[float] | None = None,
    loss: Loss = cross_entropy_of_pairs,
    params: Params | None = None,
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer] | None = None,
    forward: Forward | None = None,
) -> GradientLandscape:
    r"""Measure how losses and gradients change with the length of a step.

    ``"along_gradient"``: each batch has a gradient :math:`g` at the model's parameters
    :math:`\theta`. The loss and the gradient :math:`g(\eta)` are then taken at
    :math:`\theta - \eta g` for each rate :math:`\eta`. Changes are
    :math:`\lVert g(\eta) - g \rVert_2`, and the effective smoothness is
    :math:`\max_\eta \lVert g(\eta) - g \rVert / (\eta \lVert g \rVert)`.

    ``"multi_lr"``: one copy of the model for each learning rate is trained on the batches, one
    step for each batch. A row has the range of the copies' losses, and of their changes
    :math:`\lVert g_t - g_{t-1} \rVert_2`.

    The model runs in training mode and is left as it was: parameters, buffers, modes and random
    states. Every copy, and every point along a gradient, gets the same random numbers.

    Args:
        model: Any model.
        batches: Pairs ``(inputs, target)``, or anything that ``loss`` and ``forward`` take; read
            once and kept.
        protocol: ``"along_gradient"`` or ``"multi_lr"``.
        rates: Steps along the gradient (by default 0.1 to 0.5), or learning rates (by default 1e-4
            to 5e-4, as in the paper).
        loss: ``loss(output, batch)``; by default the cross entropy.
        params: ``params(name, parameter)`` chooses the parameters whose gradients are compared; by
            default all. (The authors' code takes the last linear layer's weight.) All parameters
            are trained.
        optimizer: ``optimizer(parameters, rate)`` for ``"multi_lr"``; by default SGD with momentum
            0.9.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.

    Returns:
        A row for each batch.

    Raises:
        OptionError: If the protocol is unknown, a rate is not positive, or ``params`` chooses
            nothing.
        DataError: If there is no batch, or a batch has no target.

    Source:
        Gunawan, Yin & Zhang, Understanding and Improving Group Normalization, sections 3.1 and
        B.2.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> pair = torch.randn(8, 6), torch.arange(8) % 4
        >>> found = gradient_landscape(model, [pair, pair])
        >>> len(found.steps), found.num_parameters
        (2, 28)
    """
    require_choice("protocol", protocol, get_args(Protocol))
    rates = tuple(rates or RATES[protocol])
    if min(rates) <= 0:
        raise OptionError(f"rates={rates} was given; every rate must be above 0")
    model = unwrap(model, "measure")
    chosen = [n for n, p in model.named_parameters() if params is None or params(n, p)]
    if not chosen:
        raise OptionError("params= chooses none of the model's parameters")
    task = _Task(as_list(batches), loss, forward or forward_batch, chosen)
    if protocol == "along_gradient":
        steps = _along_gradient(model, task, rates)
    else:
        steps = _with_rates(model, task, rates, optimizer or _sgd)
    size = sum(model.get_parameter(name).numel() for name in chosen)
    return GradientLandscape(protocol=protocol, rates=rates, num_parameters=size, steps=steps)


@dataclass(frozen=True, slots=True)
class _Task:
    """The batches, the loss, and the names of the parameters whose gradients are compared."""

    batches: list[Any]
    loss: Loss
    forward: Forward
    chosen: list[str]

    def evaluate(self, model: nn.Module, batch: Any) -> tuple[float, list[Tensor]]:
        """Compute the loss of a batch and its gradient for every trainable parameter."""
        sent = moved(batch, device_of(model))
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.enable_grad():
            value = self.loss(self.forward(model, sent), sent)
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return value.item(), list(grads)

    def chosen_gradient(self, model: nn.Module, grads: list[Tensor]) -> Tensor:
        """Join the gradients of the chosen parameters into one vector in float64."""
        named = [name for name, p in model.named_parameters() if p.requires_grad]
        kept = [g for name, g in zip(named, grads, strict=True) if name in self.chosen]
        return torch.cat([g.double().flatten() for g in kept])


def _along_gradient(model: nn.Module, task: _Task, rates: tuple[float, ...]) -> tuple[Step, ...]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]

    def evaluate_untouched(batch: Any) -> tuple[float, list[Tensor]]:
        # Buffers and random states are restored, so every rate sees the same model and dropout.
        with untouched(model, training=True):
            return task.evaluate(model, batch)

    def measure(number: int, batch: Any) -> Step:
        start, grads = evaluate_untouched(batch)
        first, losses, changes = task.chosen_gradient(model, grads), [start], []
        for rate in rates:
            _write(parameters, (p - rate * g for p, g in zip(before, grads, strict=True)))
            value, there = evaluate_untouched(batch)
            losses.append(value)
            changes.append((task.chosen_gradient(model, there) - first).norm().item())
        _write(parameters, before)
        length = torch.cat([g.double().flatten() for g in grads]).norm().item()
        ratios = [c / (r * length) for c, r in zip(changes, rates, strict=True) if length]
        return _step(number, losses, changes, max(ratios, default=None))

    batches = enumerate(progress(task.batches, "measuring gradients"), start=1)
    return attempt(lambda: tuple(starmap(measure, batches)), model, values=parameters)


def _with_rates(
    model: nn.Module,
    task: _Task,
    rates: tuple[float, ...],
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer],
) -> tuple[Step, ...]:
    runs = [_run(model, task, rate, optimizer) for rate in progress(rates, "training copies")]
    steps = []
    for number, found in enumerate(zip(*runs, strict=True), start=1):
        losses, changes = zip(*found, strict=True)
        steps.append(_step(number, losses, [c for c in changes if c is not None], None))
    return tuple(steps)


def _run(
    model: nn.Module,
    task: _Task,
    rate: float,
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer],
) -> list[tuple[float, float | None]]:
    """Train a copy; return each step's loss and the distance from the previous gradient."""
    rows: list[tuple[float, float | None]] = []
    previous = None
    with untouched(model):  # restores the random states, so that all copies draw the same numbers
        copied = copy.deepcopy(model).train()
        steps = optimizer(copied.parameters(), rate)
        for batch in task.batches:
            value, grads = task.evaluate(copied, batch)
            now = task.chosen_gradient(copied, grads)
            rows.append((value, None if previous is None else (now - previous).norm().item()))
            previous = now
            trained = (p for p in copied.parameters() if p.requires_grad)
            for p, g in zip(trained, grads, strict=True):
                p.grad = g
            steps.step()
    return rows


def _step(
    number: int, losses: Sequence[float], changes: Sequence[float], smoothness: float | None
) -> Step:
    return Step(
        name=number,
        min_loss=min(losses),
        max_loss=max(losses),
        loss_range=max(losses) - min(losses),
        min_gradient_change=min(changes, default=None),
        max_gradient_change=max(changes, default=None),
        effective_smoothness=smoothness,
    )


@torch.no_grad()
def _write(parameters: list[nn.Parameter], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _sgd(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    return SGD(parameters, lr=rate, momentum=0.9)
