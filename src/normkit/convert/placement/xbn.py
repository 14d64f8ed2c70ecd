"""XBN blocks: replacing one norm of each residual block by a batch-free norm."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from normkit.convert.execute import execute_plan
from normkit.convert.placement.batch_free import batch_free, limit_groups
from normkit.convert.placement.blocks import Layout, find_layout
from normkit.convert.plan import layers_to_standardize, make_plan
from normkit.convert.report import Conversion
from normkit.convert.selection import Chosen
from normkit.errors import OptionError
from normkit.passes import all_or_nothing, require_unwrapped
from normkit.spec import NormSpec


@all_or_nothing
def place_xbn_(  # noqa: PLR0913 - keyword options, each independent of the others
    model: nn.Module,
    position: int = 2,
    every: int = 1,
    norm: str | NormSpec = "gn:64",
    stem: bool = False,
    *,
    optimizer: Optimizer | None = None,
    example_input: Any = None,
    dry_run: bool = False,
) -> Conversion:
    r"""Replace one batch norm of each residual block by a batch-free norm, in place.

    .. math::  \text{block } b \text{ changes if } b \equiv 0 \pmod{every}, \quad b = 1, 2, \dots

    Blocks are modules whose own forward adds a shortcut to a branch with at least two norms, and
    all modules of the same classes. They are counted over the whole network. A block whose number
    of norms differs from that of most blocks is neither changed nor counted, and norms of shortcuts
    stay. Everything else is as in ``convert_norm_``.

    Args:
        model: A residual network: torchvision's, timm's or your own.
        position: Which norm of the residual branch to replace, counted from 1.
        every: Change each ``every``-th block.
        norm: Spec of a batch-free norm. Its number of groups is limited to the number of channels.
        stem: Whether to replace the norms before the first block too.
        optimizer: Edited to match the model, as in ``convert_norm_``.
        example_input: Sent through the model before and after, as in ``convert_norm_``. Also used
            to find the order of the blocks and the convolutions for ``+ws`` if ``torch.fx`` cannot
            trace the model; without it, blocks are then counted in the order of their definition.
        dry_run: Whether to only report what would be done.

    Returns:
        A report with the model, which can be printed, pickled and reverted.

    Raises:
        OptionError: If the model has no residual blocks, is wrapped or compiled, or ``position``,
            ``every`` or ``stem`` choose no norm.
        SpecError: If the norm takes statistics over the batch, or cannot be read.
        PartitionError: If its groups do not divide the channels; the error names all such layers.
        ConversionError: If a norm to be replaced has no rule.
        TraceError: If the model fails on the example input.

    Source:
        Huang, Zhou, Wang, Luo & Liu, Delving into the Estimation Shift of Batch Normalization in a
        Network, section 5; replacing the norm of the stem is what its authors' code does.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv1, self.bn1 = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)
        ...         self.conv2, self.bn2 = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)
        ...
        ...     def forward(self, x):
        ...         return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        >>> done = place_xbn_(nn.Sequential(Block(), Block()), every=2, norm="gn:32")
        >>> [(change.name, change.new) for change in done.changes]
        [('1.bn2', 'gn:32')]
    """
    require_unwrapped(model, "convert")
    spec = batch_free(norm)
    for name, value in (("position", position), ("every", every)):
        _require_ordinal(name, value)
    layout = find_layout(model, example_input)
    chosen = _chosen(layout, position, every, stem)
    specs = {module: limit_groups(spec, module) for module in chosen}
    left = {m: why for m, why in layout.reasons().items() if m not in specs}
    planned = make_plan(model, layout.found, Chosen(specs, left), None, argument="norm=")
    standardize = layers_to_standardize(model, layout.found, specs, example_input)
    return execute_plan(model, planned, standardize, optimizer, example_input, dry_run)


def _require_ordinal(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r} was given; it must be a whole number of at least 1")


def _chosen(layout: Layout, position: int, every: int, stem: bool) -> list[nn.Module]:
    """Choose the norms to replace.

    Raises:
        OptionError: If no norm is at this position, no block is chosen, or no norm is in the stem.
    """
    if position > layout.num_positions:
        raise OptionError(
            f"position={position} was given, but the blocks of this model ({layout.blocks[0].name} "
            f"and others) have {layout.num_positions} norms each; choose one of "
            f"{[*range(1, layout.num_positions + 1)]}"
        )
    blocks = layout.blocks[every - 1 :: every]
    if not blocks:
        raise OptionError(
            f"every={every} was given, but the model has {len(layout.blocks)} blocks with "
            f"{layout.num_positions} norms; choose at most {len(layout.blocks)}"
        )
    if stem and not layout.stem:
        raise OptionError("stem=True was given, but no norm comes before the blocks; leave it out")
    return [*(layout.stem if stem else ()), *(block.norms[position - 1] for block in blocks)]
