"""Bilevel search: architecture parameters by validation examples, weights by training examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LossOf = Callable[[], Tensor]
Gradients = list[Tensor]
STEP_LENGTH = 0.01  # of the finite difference, in the weights' space


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStep:
    """The step of SGD that the weights are about to take.

    Args:
        rate: Learning rate.
        momentum: Of SGD.
        weight_decay: Of the weights.
        buffers: Momentum buffers of the weights that have one.
    """

    rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    buffers: Mapping[Tensor, Tensor]

    def moves(self, weights: Sequence[Tensor], gradients: Gradients) -> Gradients:
        """What is subtracted from the weights."""
        return [
            self.rate
            * (
                gradient
                + self.weight_decay * weight.detach()
                + (self.momentum * self.buffers[weight] if weight in self.buffers else 0)
            )
            for weight, gradient in zip(weights, gradients, strict=True)
        ]


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """Gradients; zeros for what the loss does not depend on."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def second_order_gradients(
    training_loss: LossOf,
    validation_loss: LossOf,
    architecture: Sequence[Tensor],
    weights: Sequence[Tensor],
    step: WeightStep,
) -> Gradients:
    r"""Gradient of the validation loss after a step of the weights, which depends on them.

    .. math::

        \nabla_\alpha L_v(w', \alpha) - \xi \nabla^2_{\alpha, w} L_t(w, \alpha)
        \nabla_{w'} L_v(w', \alpha) \quad w' = w - \xi \nabla_w L_t(w, \alpha)

    The second term is a central difference of :math:`\nabla_\alpha L_t` along
    :math:`\nabla_{w'} L_v`, of length 0.01. Momentum and weight decay move :math:`w'` as well.
    The weights are afterwards, bit for bit, what they were.

    Args:
        training_loss: Computes :math:`L_t` by the weights as they are.
        validation_loss: Likewise :math:`L_v`.
        architecture: :math:`\alpha`.
        weights: :math:`w`.
        step: Which step, of rate :math:`\xi`.

    Source:
        Liu, Simonyan & Yang 2019, DARTS: Differentiable Architecture Search, eqs. 6 to 8.
    """
    moves = step.moves(weights, gradients_of(training_loss(), weights))
    with moved(weights, [-move for move in moves]):
        both = gradients_of(validation_loss(), [*architecture, *weights])
    direct, along = both[: len(architecture)], both[len(architecture) :]
    norm = torch.stack([g.norm() for g in along]).norm()
    if not float(norm):
        return direct
    length = STEP_LENGTH / norm
    sides = []
    for sign in (1, -1):
        with moved(weights, [sign * length * g for g in along]):
            sides.append(gradients_of(training_loss(), architecture))
    return [
        gradient - step.rate * (ahead - behind) / (2 * length)
        for gradient, ahead, behind in zip(direct, *sides, strict=True)
    ]


@contextmanager
def moved(weights: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Add to the weights in a block; afterwards they are what they were."""
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, change in zip(weights, by, strict=True):
                weight.add_(change)
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


class ArchitectureOptimizer:
    """Moves architecture parameters by Adam.

    Args:
        architecture: The parameters.
        rate: Learning rate.
        weight_decay: Of these parameters.
    """

    def __init__(
        self, architecture: Sequence[nn.Parameter], rate: float, weight_decay: float
    ) -> None:
        self.architecture = list(architecture)
        self._adam = torch.optim.Adam(
            self.architecture, lr=rate, betas=(0.5, 0.999), weight_decay=weight_decay
        )

    def step(self, gradients: Gradients) -> None:
        """Take a step along these gradients."""
        for parameter, gradient in zip(self.architecture, gradients, strict=True):
            parameter.grad = gradient
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Adam's state, by names."""
        known = self._adam.state_dict()["state"]
        return {f"{at}.{name}": value for at, of in known.items() for name, value in of.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        known: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            at, _, key = name.partition(".")
            known.setdefault(int(at), {})[key] = value
        self._adam.load_state_dict(self._adam.state_dict() | {"state": known})


def weight_step_of(
    optimizer: torch.optim.Optimizer, rate: float, momentum: float, weight_decay: float
) -> WeightStep:
    """The step that an optimizer is about to take; by SGD if it is another."""
    buffers = {
        weight: state["momentum_buffer"]
        for weight, state in optimizer.state.items()
        if state.get("momentum_buffer") is not None
    }
    return WeightStep(rate=rate, momentum=momentum, weight_decay=weight_decay, buffers=buffers)
