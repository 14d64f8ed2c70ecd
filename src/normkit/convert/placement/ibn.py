"""IBN-Net: placing instance norm in the early stages of a residual network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from normkit.convert.execute import execute_plan
from normkit.convert.placement.after_sum import has_norm_after_sum, norm_after_sum
from normkit.convert.placement.blocks import Block, Layout, find_layout
from normkit.convert.plan import make_plan
from normkit.convert.report import Conversion
from normkit.convert.selection import Chosen
from normkit.errors import OptionError
from normkit.passes import all_or_nothing, require_unwrapped
from normkit.spec import NormSpec

Variant = Literal["a", "b"]
STAGES = 4
"""Number of stages of the paper's networks."""


@all_or_nothing
def place_ibn_(
    model: nn.Module,
    variant: Variant = "a",
    *,
    optimizer: Optimizer | None = None,
    example_input: Any = None,
    dry_run: bool = False,
) -> Conversion:
    """Turn a residual network into an IBN-Net, in place.

    Variant ``"a"``: the first norm of each residual block becomes ``ibn``, in all stages but the
    last (in a ResNet: in the first three of four). Variant ``"b"``: the last norm of the stem
    becomes ``in``, and an affine instance norm is inserted after the sum and before the activation,
    in the last block of each of the first two stages.

    Blocks are found as in ``place_xbn_``. If exactly four modules contain the blocks, these are the
    stages; otherwise each block with a stride above 1 begins a new stage. Everything else is as in
    ``convert_norm_``.

    Args:
        model: A residual network: torchvision's, timm's or your own.
        variant: ``"a"`` or ``"b"``.
        optimizer: Edited to match the model, as in ``convert_norm_``; parameters of an inserted
            norm join the group of the block's last norm.
        example_input: Sent through the model before and after, as in ``convert_norm_``. Also used
            to find the order of the blocks if ``torch.fx`` cannot trace the model.
        dry_run: Whether to only report what would be done.

    Returns:
        A report with the model, which can be printed, pickled and reverted.

    Raises:
        OptionError: If the variant is unknown, or the model has no residual blocks, too few
            stages, or is wrapped or compiled.
        ConversionError: If a norm has no rule, or a block has no place for a norm after its sum.
        TraceError: If the model fails on the example input.

    Source:
        Pan, Luo, Shi & Tang 2018, Two at Once: Enhancing Learning and Generalization Capacities via
        IBN-Net, arXiv:1807.09441.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv1, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        ...         self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        ...
        ...     def forward(self, x):
        ...         return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        >>> stages = [nn.Sequential(Block()) for _ in range(4)]
        >>> [change.name for change in place_ibn_(nn.Sequential(*stages)).changes]
        ['0.0.bn1', '1.0.bn1', '2.0.bn1']
    """
    require_unwrapped(model, "convert")
    if variant not in get_args(Variant):
        raise OptionError(
            f"variant={variant!r} was given; it must be one of {[*get_args(Variant)]}"
        )
    layout = find_layout(model, example_input)
    stages = _stages(layout, variant)
    place = _variant_a if variant == "a" else _variant_b
    specs, blocks = place(layout, stages)
    left = {m: why for m, why in layout.reasons().items() if m not in specs}
    without = [block for block in blocks if not has_norm_after_sum(block)]
    added = tuple(norm_after_sum(block, model) for block in without)
    planned = make_plan(model, layout.found, Chosen(specs, left), None, added)
    return execute_plan(model, planned, (), optimizer, example_input, dry_run)


Placed = tuple[dict[nn.Module, NormSpec], list[Block]]
"""The specs of the norms to replace, and the blocks that get a norm after their sum."""


def _variant_a(layout: Layout, stages: Sequence[Sequence[Block]]) -> Placed:
    spec = NormSpec.parse("ibn")
    return {block.norms[0]: spec for stage in stages[:-1] for block in stage}, []


def _variant_b(layout: Layout, stages: Sequence[Sequence[Block]]) -> Placed:
    specs = {norm: NormSpec.parse("in") for norm in layout.stem[-1:]}
    return specs, [stage[-1] for stage in stages[:2]]


def _stages(layout: Layout, variant: str) -> list[list[Block]]:
    """Divide the blocks into stages.

    Raises:
        OptionError: If there are too few stages for the variant.
    """
    holders = [
        [*blocks]
        for _, blocks in groupby(layout.blocks, lambda block: block.name.rpartition(".")[0])
    ]
    stages = holders if len(holders) == STAGES else _by_stride(layout.blocks)
    least = {"a": 2, "b": 3}[variant]
    if len(stages) < least:
        raise OptionError(
            f"variant={variant!r} needs at least {least} stages, but the {len(layout.blocks)} "
            f"blocks form {len(stages)}; name the norms yourself: "
            f"convert_norm_(model, {{'layer1.*.bn1': 'ibn'}})"
        )
    return stages


def _by_stride(blocks: Sequence[Block]) -> list[list[Block]]:
    stages: list[list[Block]] = []
    for block in blocks:
        if not stages or _has_stride(block.own.module):
            stages.append([])
        stages[-1].append(block)
    return stages


def _has_stride(module: nn.Module) -> bool:
    strides = [getattr(part, "stride", 1) for part in module.modules()]
    return any(max(s) > 1 if isinstance(s, tuple) else s > 1 for s in strides)
