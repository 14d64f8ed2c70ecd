"""TSM: a network for pictures that sees frames of a clip, some channels of them a frame away."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from normkit.errors import SpecError
from normkit.text import printable

SHARE = 8  # an eighth of the channels comes from the frame after, and one from the frame before


def shifted(x: Float[Tensor, "m c h w"], num_frames: int) -> Float[Tensor, "m c h w"]:
    """Exchange channels between neighbouring frames; zeros come in at the ends of a clip.

    Args:
        x: Maps of frames, clip after clip.
        num_frames: Frames of a clip.

    Source:
        Lin, Gan & Han 2019, TSM, arXiv:1811.08383, section 3: 1/8 each way.
    """
    clips = x.unflatten(0, (-1, num_frames))
    part = x.shape[1] // SHARE
    after, before, rest = clips.split([part, part, x.shape[1] - 2 * part], 2)
    zeros = torch.zeros_like(after[:, :1])
    after = torch.cat([after[:, 1:], zeros], 1)
    before = torch.cat([zeros, before[:, :-1]], 1)
    return torch.cat([after, before, rest], 2).flatten(0, 1)


class TemporalShift:
    """Shifts what a module gets, as a hook before its forward: its weights keep their names.

    Args:
        num_frames: Frames of a clip.
    """

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Shift the first argument."""
        return (shifted(args[0], self.num_frames), *args[1:])


class FrameMean(nn.Module):
    """The mean over the frames of a clip of what a network says of each.

    A norm inside sees ``N * T`` maps: those of all frames of all clips of a batch. One that pools
    examples pools frames, and one of a single example has the statistics of a frame.

    Args:
        network: Gives scores of each picture.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Float[Tensor, "n t c h w"]) -> Float[Tensor, "n k"]:
        """Scores of each clip."""
        scores = self.network(clips.flatten(0, 1))
        return scores.unflatten(0, clips.shape[:2]).mean(1)


def tsm(network: nn.Module, num_frames: int, name: str) -> FrameMean:
    """Let a residual network see clips: the branch of each block begins with a shift.

    Args:
        network: A ResNet whose blocks call ``conv1`` first; changed in place.
        num_frames: Frames of a clip.
        name: How messages call it.

    Raises:
        SpecError: If it has no such block.
    """
    first = [getattr(part, "conv1", None) for part in network.modules() if hasattr(part, "conv2")]
    branches = [conv for conv in first if isinstance(conv, nn.Conv2d)]
    if not branches:
        raise SpecError(
            f"model {printable(name)} has no residual blocks with conv1 and conv2, before which "
            f"frames are shifted; choose torchvision:resnet50, a ResNet of timm's or small-resnet"
        )
    for conv in branches:
        conv.register_forward_pre_hook(TemporalShift(num_frames))
    return FrameMean(network)
