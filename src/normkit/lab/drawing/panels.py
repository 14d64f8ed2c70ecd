"""The contents of a drawing: the group of every element, its letter and its colour."""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normkit.sharing import Part, parts

# Okabe and Ito's colours, which colour-blind readers can tell apart, then lighter versions of them.
STRONG = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
LIGHT = ("#f2cf80", "#abdaf4", "#80cfb9", "#f8f2a1", "#80b9d9", "#eaaf80", "#e6bcd3")
COLOURS = STRONG + LIGHT
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits

Indices = list[int | None]  # None is a gap, which stands for the indices that are not drawn


class View(NamedTuple):
    """The indices of each axis that are drawn."""

    examples: Indices
    channels: Indices
    rows: Indices
    columns: Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A part of a layer, ready to be drawn.

    Args:
        title: Name of the part, number of groups and number of elements in each.
        cells: The group of every element as ``(N, C, rows, columns)``; -1 for none.
        stride: Number of groups that one example, or one run of examples, is cut into.
    """

    title: str
    cells: Tensor
    stride: int

    def key(self, view: View) -> "Key":
        """Give letters and colours to the groups that are drawn."""
        cells = self.cells
        for axis, indices in enumerate(view):
            drawn = torch.tensor([index for index in indices if index is not None])
            cells = cells.index_select(axis, drawn)
        groups = cells[cells >= 0].unique().tolist()
        return Key({group: rank for rank, group in enumerate(groups)}, self.stride)


class Key(NamedTuple):
    """Letters and colours of groups; many groups share them, but not neighbouring groups."""

    ranks: dict[int, int]
    stride: int

    def letter(self, group: int) -> str:
        """The group's letter or digit."""
        return LETTERS[self.ranks[group] % len(LETTERS)]

    def colour(self, group: int) -> str:
        """The group's colour, ``"#rrggbb"``."""
        if len(self.ranks) <= len(COLOURS):
            return COLOURS[self.ranks[group]]
        # With such a stride a colour would stand below or beside itself in the next example.
        meets_itself = self.stride % len(COLOURS) in (0, 1, len(COLOURS) - 1)
        shift = 5 * (group // self.stride) if meets_itself else 0
        return COLOURS[(group + shift) % len(COLOURS)]


def panels_of(layer: nn.Module, shape: Sequence[int]) -> list[Panel]:
    """Make a panel of a feature map of this shape for every part of a layer in its present mode.

    Raises:
        InputTypeError: If the layer is not one of normkit's.
        PartitionError: If its groups do not divide the map.
    """
    return [_panel(part, shape) for part in parts(layer)]


def _panel(part: Part, shape: Sequence[int]) -> Panel:
    index = part.index(shape)
    num_positions, num_columns = math.prod(shape[2:]), [1, *shape[2:]][-1]
    name = "" if part.name == "statistics" else f"{part.name}: "
    return Panel(
        title=name + _legend(part, index),
        cells=index.reshape(*shape[:2], num_positions // num_columns, num_columns),
        stride=num_positions if part.partition is None else part.partition.num_groups,
    )


def _legend(part: Part, index: Tensor) -> str:
    sizes = torch.bincount(index[index >= 0])
    groups = f"{len(sizes)} group{'' if len(sizes) == 1 else 's'}"
    share = "" if part.share == 1 else f", with a weight of {part.share:g}"
    if part.origin == "running":
        return f"{groups}, running statistics, which do not depend on the input{share}"
    smallest, largest = int(sizes.min()), int(sizes.max())
    each = f"{largest} elements{' each' if len(sizes) > 1 else ''}"
    if part.origin == "estimates":
        return f"{groups}, running estimates updated with {each}"
    rest = "" if smallest == largest else f", {smallest} in the last examples"
    return f"{groups}, statistics over {each}{rest}{share}"


def shown(size: int, at_most: int, when_more: int | None = None) -> Indices:
    """Indices of an axis that are drawn: all of them, or the first ones, a gap and the last one.

    Example:
        >>> shown(4, 4), shown(9, 4)
        ([0, 1, 2, 3], [0, 1, None, 8])
    """
    if size <= at_most:
        return list(range(size))
    return [*range(max((when_more or at_most) - 2, 1)), None, size - 1]


def is_dark(colour: str) -> bool:
    """Whether white text is easier to read on the colour than black text."""
    red, green, blue = bytes.fromhex(colour[1:])
    return 0.299 * red + 0.587 * green + 0.114 * blue < 115
