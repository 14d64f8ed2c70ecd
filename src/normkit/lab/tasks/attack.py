"""Attacks by projected gradient descent: small changes of pixels that raise a network's loss."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.data.dataset import Scaling

Inputs = Float[Tensor, "n c h w"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelRange:
    """Black and white of each channel, in the units of a network's inputs.

    A picture's pixels go from 0 to 1; a network may get them scaled. A change of the pixels by
    ``epsilon`` is one of the inputs by ``epsilon * unit``.
    """

    low: Float[Tensor, "1 c 1 1"]
    high: Float[Tensor, "1 c 1 1"]

    @classmethod
    def of(cls, scaling: Scaling | None, low: float, high: float) -> Self:
        """The range of pictures whose values go from ``low`` to ``high`` before they are scaled."""
        ends = (torch.full((1, 1, 1, 1), float(value)) for value in (low, high))
        black, white = ends if scaling is None else map(scaling, ends)
        return cls(low=black, high=white)

    @property
    def unit(self) -> Float[Tensor, "1 c 1 1"]:
        """From black to white."""
        return self.high - self.low

    def to(self, inputs: Inputs) -> Self:
        """The same range on the device of these inputs, in their dtype."""
        return type(self)(low=self.low.to(inputs), high=self.high.to(inputs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    r"""Projected gradient descent in the largest norm, without a target.

    .. math::  x_{t+1} = \Pi \left( x_t + \alpha \, \mathrm{sign} \, \nabla_x L(x_t) \right)

    :math:`\Pi` projects onto the pictures within ``epsilon`` of the given one, and onto those that
    there are: no pixel is darker than black or brighter than white.

    Args:
        epsilon: How far a pixel may move, with 1 from black to white.
        step_size: How far it moves in a step, :math:`\alpha`, in the same unit.
        num_steps: Steps.
        pixels: Black and white in the units of the network's inputs.
        random_start: Whether the first step starts anywhere in the ball, not at the picture.

    Source:
        Madry et al. 2018, arXiv:1706.06083, section 2.1.
    """

    epsilon: float
    step_size: float
    num_steps: int
    pixels: PixelRange
    random_start: bool = True

    @torch.enable_grad()
    def __call__(
        self,
        network: nn.Module,
        inputs: Inputs,
        targets: Int[Tensor, " n"],
        generator: torch.Generator | None = None,
    ) -> Inputs:
        """Change pictures so that the network, in the mode it is in, tells them apart badly.

        Args:
            network: Gives a row of scores for each input. No gradient of its parameters is left.
            inputs: What it gets, scaled.
            targets: Their classes.
            generator: Draws the start; by default torch's own on the device.
        """
        pixels, inputs = self.pixels.to(inputs), inputs.detach()
        ball = self.epsilon * pixels.unit
        least = torch.maximum(inputs - ball, pixels.low)
        most = torch.minimum(inputs + ball, pixels.high)
        x = inputs
        if self.random_start:
            share = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = (x + (2 * share - 1) * ball).clamp(least, most)
        for _ in range(self.num_steps):
            x = x.detach().requires_grad_()
            # A sum: in evaluation mode each picture has the gradient that it would have alone.
            loss = functional.cross_entropy(network(x), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            x = (x.detach() + self.step_size * pixels.unit * gradient.sign()).clamp(least, most)
        return x.detach()


@contextmanager
def evaluation_mode(network: nn.Module) -> Generator[None]:
    """Run the block in evaluation mode, then put the mode of every module back."""
    before = {module: module.training for module in network.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def buffers_kept(network: nn.Module) -> Generator[None]:
    """Run the block on copies of all buffers: what it does to running statistics is dropped.

    The tensors themselves are put back, which the autograd graphs of forwards within do not notice.
    """
    before = {module: dict(module._buffers) for module in network.modules() if module._buffers}
    copies: dict[Tensor, Tensor] = {}
    try:
        for module, buffers in before.items():
            for name, buffer in buffers.items():
                if buffer is not None:
                    copies.setdefault(buffer, buffer.clone())
                    module._buffers[name] = copies[buffer]
        yield
    finally:
        for module, buffers in before.items():
            module._buffers.update(buffers)


def autocast_of(precision: str, device: torch.device) -> torch.autocast:
    """What Fabric's precision does around a forward, for forwards past it."""
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision.endswith("mixed"))
