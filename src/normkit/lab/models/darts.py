"""Networks of cells: one that searches for the cells, and one of the cells that were found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.models.architecture import Shapes, architecture
from normkit.lab.models.genotype import (
    EDGES,
    EDGES_PER_NODE,
    GENOTYPES,
    NUM_INPUTS,
    NUM_NODES,
    OPERATIONS,
    Genotype,
    Kind,
    derived,
)
from normkit.lab.models.operations import (
    FactorizedReduce,
    Mixed,
    make_operation,
    relu_conv_norm,
)

STEM_RATIO = 3  # channels of the stem, for each channel of the first cells
AUXILIARY_CHANNELS = (128, 768)
FIRST_WEIGHT_DEVIATION = 1e-3  # of the search's first architecture parameters
AUXILIARY_SIDE = 8  # of the map that the original's auxiliary head is for


class MakeCell(Protocol):
    """Makes a cell; its output has ``cell.num_channels`` channels."""

    def __call__(
        self,
        channels_before: tuple[int, int],
        num_channels: int,
        *,
        halves: bool = False,
        after_halving: bool = False,
    ) -> nn.Module:
        """Make the next cell, which is called as ``cell(x0, x1)``.

        Args:
            channels_before: Of the outputs of the cell before the last one, and of the last one.
            num_channels: Of each node.
            halves: Whether it halves the map.
            after_halving: Whether the last cell did.
        """
        ...


class _Inputs(nn.Module):
    """Brings the outputs of the two cells before to one size and number of channels."""

    def __init__(
        self, before: tuple[int, int], num_channels: int, *, after_halving: bool, affine: bool
    ) -> None:
        super().__init__()
        if after_halving:
            self.older: nn.Module = FactorizedReduce(before[0], num_channels, affine=affine)
        else:
            self.older = relu_conv_norm(before[0], num_channels, affine=affine)
        self.newer = relu_conv_norm(before[1], num_channels, affine=affine)

    def forward(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        return [self.older(x0), self.newer(x1)]


class ArchitectureWeights(nn.Module):
    """The parameters of a search: how much each operation counts on each edge.

    Args:
        generator: Draws the first values.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        shape = (2, len(EDGES), len(OPERATIONS))
        first = FIRST_WEIGHT_DEVIATION * torch.randn(shape, generator=generator)
        self.normal, self.reduce = nn.Parameter(first[0]), nn.Parameter(first[1])

    def weights(self, kind: Kind) -> Float[Tensor, "14 8"]:
        """Of the operations on each edge; they sum to 1."""
        return (self.normal if kind == "normal" else self.reduce).softmax(-1)

    def genotype(self) -> Genotype:
        """The cells that are strongest now."""
        return derived(self.weights("normal").detach(), self.weights("reduce").detach())


class SearchCell(nn.Module):
    """A cell in which every edge has all operations.

    Args:
        shared: The weights of the operations, which all cells of a kind share.
        before: Channels of the outputs of the two cells before.
        num_channels: Of each node.
        halves: Whether it halves the map.
        after_halving: Whether the last cell did.
    """

    def __init__(
        self,
        shared: ArchitectureWeights,
        before: tuple[int, int],
        num_channels: int,
        *,
        halves: bool = False,
        after_halving: bool = False,
    ) -> None:
        super().__init__()
        self._shared = [shared]  # a list, so that it is registered once, by the network
        self.kind: Kind = "reduce" if halves else "normal"
        self.num_channels = NUM_NODES * num_channels
        self.inputs = _Inputs(before, num_channels, after_halving=after_halving, affine=False)
        self.edges = nn.ModuleList(
            Mixed(OPERATIONS, num_channels, 2 if halves and source < NUM_INPUTS else 1)
            for _, source in EDGES
        )

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The cell's own nodes side by side."""
        nodes: list[Tensor] = self.inputs(x0, x1)
        weights = iter(zip(self.edges, self._shared[0].weights(self.kind), strict=True))
        for _ in range(NUM_NODES):
            parts = [edge(x, w) for x, (edge, w) in zip(tuple(nodes), weights, strict=False)]
            nodes.append(torch.stack(parts).sum(0))
        return torch.cat(nodes[NUM_INPUTS:], 1)


class Cell(nn.Module):
    """A cell of a genotype.

    ``drop_path`` is the share of examples for which a path through an operation is left out in
    training; identities are never left out.

    Args:
        genotype: Says which operations.
        before: Channels of the outputs of the two cells before.
        num_channels: Of each node.
        halves: Whether it halves the map.
        after_halving: Whether the last cell did.
    """

    def __init__(
        self,
        genotype: Genotype,
        before: tuple[int, int],
        num_channels: int,
        *,
        halves: bool = False,
        after_halving: bool = False,
    ) -> None:
        super().__init__()
        kind: Kind = "reduce" if halves else "normal"
        edges = genotype.edges(kind)
        self.drop_path = 0.0
        self.sources, self.concat = [edge.node for edge in edges], genotype.concat(kind)
        self.num_channels = len(self.concat) * num_channels
        self.inputs = _Inputs(before, num_channels, after_halving=after_halving, affine=True)
        self.operations = nn.ModuleList(
            make_operation(
                edge.operation,
                num_channels,
                2 if halves and edge.node < NUM_INPUTS else 1,
                in_search=False,
            )
            for edge in edges
        )

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The nodes that the genotype gives, side by side."""
        nodes: list[Tensor] = self.inputs(x0, x1)
        parts = list(zip(self.operations, self.sources, strict=True))
        for at in range(0, len(parts), EDGES_PER_NODE):
            two = [self._path(*part, nodes) for part in parts[at : at + EDGES_PER_NODE]]
            nodes.append(two[0] + two[1])
        return torch.cat([nodes[at] for at in self.concat], 1)

    def _path(self, operation: nn.Module, source: int, nodes: Sequence[Tensor]) -> Tensor:
        y = operation(nodes[source])
        if not self.training or not self.drop_path or isinstance(operation, nn.Identity):
            return y
        keep = 1 - self.drop_path
        kept = torch.rand(len(y), 1, 1, 1, device=y.device) < keep
        return y * kept / keep


class AuxiliaryHead(nn.Module):
    """A classifier on the map of a cell two thirds down the network, for training only."""

    def __init__(self, num_in: int, shapes: Shapes, side: int) -> None:
        super().__init__()
        first, second = AUXILIARY_CHANNELS
        pool: nn.Module = nn.AdaptiveAvgPool2d(2)
        if side == AUXILIARY_SIDE:
            pool = nn.AvgPool2d(5, stride=3)  # as in the original, whose windows overlap
        self.layers = nn.Sequential(
            nn.ReLU(),
            pool,
            *(nn.Conv2d(num_in, first, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()),
            *(nn.Conv2d(first, second, 2, bias=False), nn.BatchNorm2d(second), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(second, shapes.num_classes),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Scores of the classes."""
        return self.layers(x)


class CellNetwork(nn.Module):
    """A stem, cells of which two halve the map and double the channels, and a classifier.

    Args:
        make_cell: Makes the cells.
        shapes: Of an input, and the number of classes.
        num_cells: How many; those at a third and two thirds of them halve the map.
        num_channels: Of the nodes of the first cells.
        auxiliary: Whether it has an auxiliary head, whose scores come second in training.

    Source:
        Liu et al. 2019, section 3.1; details as in the authors' code.
    """

    def __init__(
        self,
        make_cell: MakeCell,
        shapes: Shapes,
        *,
        num_cells: int,
        num_channels: int,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        width = STEM_RATIO * num_channels
        conv = nn.Conv2d(shapes.input_shape[0], width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        before, after_halving = (width, width), False
        for at in range(num_cells):
            halves = at in (num_cells // 3, 2 * num_cells // 3)
            num_channels *= 2 if halves else 1
            cell = make_cell(before, num_channels, halves=halves, after_halving=after_halving)
            self.cells.append(cell)
            before, after_halving = (before[1], int(cell.num_channels)), halves  # type: ignore[arg-type]
        self.auxiliary_at = 2 * num_cells // 3 if auxiliary else None
        self.auxiliary: AuxiliaryHead | None = None
        if self.auxiliary_at is not None:
            channels = int(self.cells[self.auxiliary_at].num_channels)  # type: ignore[arg-type]
            self.auxiliary = AuxiliaryHead(channels, shapes, -(-shapes.input_shape[1] // 4))
        self.shows_auxiliary = False  # in evaluation, too: so that norms of the head are seen
        self.classifier = nn.Linear(before[1], shapes.num_classes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Tensor | tuple[Tensor, Tensor]:
        """Scores of the classes; in training also those of an auxiliary head, if there is one."""
        x0 = x1 = self.stem(x)
        seen = x1
        for at, cell in enumerate(self.cells):
            x0, x1 = x1, cell(x0, x1)
            seen = x1 if at == self.auxiliary_at else seen
        scores = self.classifier(functional.adaptive_avg_pool2d(x1, 1).flatten(1))
        if self.auxiliary is None or not (self.training or self.shows_auxiliary):
            return scores
        return scores, self.auxiliary(seen)


class Supernet(nn.Module):
    """A network whose cells have all operations, and the weights of these.

    Args:
        make_body: Makes the network with a function that makes its cells.
    """

    def __init__(self, make_body: Callable[[MakeCell], nn.Module]) -> None:
        super().__init__()
        self.architecture = ArchitectureWeights()

        def make_cell(
            channels_before: tuple[int, int],
            num_channels: int,
            *,
            halves: bool = False,
            after_halving: bool = False,
        ) -> nn.Module:
            options = {"halves": halves, "after_halving": after_halving}
            return SearchCell(self.architecture, channels_before, num_channels, **options)

        self.body = make_body(make_cell)

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives."""
        return self.body(x)


def cells_of(genotype: Genotype) -> MakeCell:
    """A function that makes the cells of a genotype."""

    def make_cell(
        channels_before: tuple[int, int],
        num_channels: int,
        *,
        halves: bool = False,
        after_halving: bool = False,
    ) -> nn.Module:
        options = {"halves": halves, "after_halving": after_halving}
        return Cell(genotype, channels_before, num_channels, **options)

    return make_cell


@architecture("darts")
@dataclass(frozen=True, slots=True, kw_only=True)
class Darts:
    """The network that DARTS found on CIFAR-10 by the second order, without an auxiliary head.

    The task ``search`` builds it of other cells.

    Source:
        Liu et al. 2019, section 3.3: 20 cells and 36 channels.
    """

    cells: int = 20
    channels: int = 36

    def build(self, shapes: Shapes) -> nn.Module:
        """Build the network for these shapes."""
        return self.network(cells_of(GENOTYPES["darts-v2"]), shapes)

    def network(
        self, make_cell: MakeCell, shapes: Shapes, *, auxiliary: bool = False
    ) -> CellNetwork:
        """The network of other cells."""
        return CellNetwork(
            make_cell,
            shapes,
            num_cells=self.cells,
            num_channels=self.channels,
            auxiliary=auxiliary,
        )
