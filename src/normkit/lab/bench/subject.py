"""A module with an input: its training step, and the memory of the step."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from normkit.lab.bench.errors import BenchError
from normkit.lab.bench.peers import Peer
from normkit.lab.bench.timing import Call
from normkit.lab.frozen import Frozen
from normkit.lab.measure import peak_step_bytes

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.bfloat16: 5e-2,  # 8 bits of mantissa, rounded twice
    torch.float16: 1e-2,
}
"""Largest difference between two correct results, relative to the largest value."""

Timed = Literal["forward", "forward_backward"]


class Memory(Frozen):
    """Bytes of a training step.

    ``kept_bytes`` are kept by the forward pass for the backward pass: with the input, without
    parameters and buffers. ``peak_bytes`` are the peak of the step.
    """

    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Subject:
    """A layer in training mode, its input, and the gradient of its output."""

    layer: nn.Module
    x: Tensor
    grad: Tensor

    @classmethod
    def of(cls, peer: Peer, x: Tensor, grad: Tensor) -> "Subject":
        """A peer with its own copies of the inputs."""
        return cls(peer.module, peer.arrange(x).detach().requires_grad_(), peer.arrange(grad))

    def forward(self) -> Tensor:
        """The forward pass of training."""
        return self.layer(self.x)

    def step(self) -> None:
        """Forward and backward."""
        self.layer(self.x).backward(self.grad)

    def drop_gradients(self) -> None:
        """Drop all gradients, so that the next step allocates them again."""
        for tensor in (self.x, *self.layer.parameters()):
            tensor.grad = None

    def call(self, timed: Timed) -> Call:
        """The call that is timed."""
        run = self.forward if timed == "forward" else self.step
        return Call(run=run, prepare=self.drop_gradients)

    def results(self) -> tuple[Tensor, Tensor]:
        """Output and gradient of the input."""
        y = self.forward()
        (dx,) = torch.autograd.grad(y, self.x, self.grad)
        return y.detach(), dx

    def memory(self) -> Memory:
        """Measure the memory of a step."""
        self.drop_gradients()
        # The optimizer also gets the input, so that its gradient is dropped between the steps.
        optimizer = torch.optim.SGD([self.x, *self.layer.parameters()], lr=0.1)
        peak = peak_step_bytes(self.step, self.layer, optimizer)
        self.drop_gradients()
        return Memory(kept_bytes=self._kept_bytes(), peak_bytes=peak)

    def _kept_bytes(self) -> int:
        own = [*self.layer.parameters(), *self.layer.buffers()]
        not_counted = {t.untyped_storage().data_ptr() for t in own}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            y = self.forward()
        del y
        return sum(size for at, size in kept.items() if at not in not_counted)


def require_agreement(ours: Subject, peer: Subject, restored: Peer, where: str) -> None:
    """Check that two layers compute the same before their times are compared.

    Args:
        ours: Our layer.
        peer: The peer.
        restored: The peer's description, whose ``restore`` brings results into our order.
        where: Name of the layer and the input, for the error message.

    Raises:
        BenchError: If outputs or gradients of the input differ.
    """
    names = ("outputs", "input gradients")
    for name, a, b in zip(names, ours.results(), peer.results(), strict=True):
        difference = _relative_difference(a, restored.restore(b))
        allowed = TOLERANCE[a.dtype]
        if not difference <= allowed:  # also refuses NaN
            raise BenchError(
                f"{where}: the {name} of ours and of {restored.name} differ by {difference:.2g} "
                f"of the largest value, more than {allowed:g}; times of different results are "
                f"not compared"
            )


def _relative_difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("nan")
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
