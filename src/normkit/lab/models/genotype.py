"""What a searched network is: which operation on which input, for two kinds of cells."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from normkit.errors import SpecError
from normkit.lab.files import require_file, write_whole
from normkit.lab.frozen import Frozen
from normkit.text import printable, shortened

NONE = "none"
OPERATIONS = (
    NONE,
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The operations of the search space, by their names in the paper's code, in its order."""
NUM_INPUTS, NUM_NODES, EDGES_PER_NODE = 2, 4, 2
EDGES = tuple(
    (NUM_INPUTS + node, before) for node in range(NUM_NODES) for before in range(NUM_INPUTS + node)
)
"""All edges of a cell, as a node and one that comes before it: 14 of them, node by node."""
Kind = Literal["normal", "reduce"]
EXAMPLE = (
    "Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), reduce=[...], "
    "reduce_concat=range(2, 6))"
)


class Edge(NamedTuple):
    """An operation of a cell, and the node whose output it takes.

    Nodes 0 and 1 are the outputs of the two cells before, and the next ones are the cell's own.
    """

    operation: str
    node: int


class Genotype(Frozen):
    """Two cells of four nodes each; a node is the sum of two operations on nodes before it.

    ``reduce`` is the cell that halves the map. A cell's output is the nodes of ``..._concat``
    side by side.

    Args:
        normal: Two edges for each of the nodes 2 to 5, in order.
        reduce: Likewise.
        normal_concat: Nodes.
        reduce_concat: Nodes.

    Raises:
        SpecError: From ``checked`` and ``read``, with what is known.

    Source:
        Liu, Simonyan & Yang 2019, DARTS: Differentiable Architecture Search, section 2 and
        figure 4.
    """

    normal: tuple[Edge, ...]
    reduce: tuple[Edge, ...]
    normal_concat: tuple[int, ...] = (2, 3, 4, 5)
    reduce_concat: tuple[int, ...] = (2, 3, 4, 5)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for kind in ("normal", "reduce"):
            _check_edges(kind, self.edges(kind))
            _check_concat(kind, self.concat(kind))
        return self

    def edges(self, kind: Kind) -> tuple[Edge, ...]:
        """The edges of a cell."""
        return self.normal if kind == "normal" else self.reduce

    def concat(self, kind: Kind) -> tuple[int, ...]:
        """The nodes whose outputs a cell gives."""
        return self.normal_concat if kind == "normal" else self.reduce_concat

    def __str__(self) -> str:
        """As the paper's code writes it."""
        parts = [
            f"{kind}={[tuple(edge) for edge in self.edges(kind)]}, "
            f"{kind}_concat={list(self.concat(kind))}"
            for kind in ("normal", "reduce")
        ]
        return f"Genotype({', '.join(parts)})"

    def write(self, path: Path) -> Path:
        """Write it as JSON, whole.

        Raises:
            DataError: If it cannot be written.
        """
        return write_whole(path, self.model_dump_json(indent=1) + "\n")


def _check_edges(kind: str, edges: Sequence[Edge]) -> None:
    num_edges = EDGES_PER_NODE * NUM_NODES
    if len(edges) != num_edges:
        raise SpecError(
            f"the {kind} cell of a genotype has {len(edges)} edges; it has {num_edges}, two for "
            f"each of its {NUM_NODES} nodes"
        )
    for at, (operation, before) in enumerate(edges):
        node = NUM_INPUTS + at // EDGES_PER_NODE
        if operation not in OPERATIONS[1:]:
            raise SpecError(
                f"the {kind} cell of a genotype has the operation {printable(operation)!r}; known "
                f"are {', '.join(OPERATIONS[1:])}"
            )
        if not 0 <= before < node:
            raise SpecError(
                f"node {node} of the {kind} cell of a genotype takes the output of node {before}; "
                f"it takes those of nodes 0 to {node - 1}"
            )


def _check_concat(kind: str, concat: Sequence[int]) -> None:
    own = range(NUM_INPUTS, NUM_INPUTS + NUM_NODES)
    if not concat or len(set(concat)) < len(concat) or not set(concat) <= set(own):
        raise SpecError(
            f"the {kind} cell of a genotype gives the nodes {list(concat)}; it gives one or more "
            f"of {list(own)}, each once"
        )


def _known(normal: str, reduce: str) -> Genotype:
    cells = [tuple((o, int(n)) for o, n in re.findall(r"(\w+)~(\d)", s)) for s in (normal, reduce)]
    return Genotype.checked({"normal": cells[0], "reduce": cells[1]})


GENOTYPES: Mapping[str, Genotype] = MappingProxyType(
    {
        "darts-v1": _known(
            "sep_conv_3x3~1 sep_conv_3x3~0 skip_connect~0 sep_conv_3x3~1 "
            "skip_connect~0 sep_conv_3x3~1 sep_conv_3x3~0 skip_connect~2",
            "max_pool_3x3~0 max_pool_3x3~1 skip_connect~2 max_pool_3x3~0 "
            "max_pool_3x3~0 skip_connect~2 skip_connect~2 avg_pool_3x3~0",
        ),
        "darts-v2": _known(
            "sep_conv_3x3~0 sep_conv_3x3~1 sep_conv_3x3~0 sep_conv_3x3~1 "
            "sep_conv_3x3~1 skip_connect~0 skip_connect~0 dil_conv_3x3~2",
            "max_pool_3x3~0 max_pool_3x3~1 skip_connect~2 max_pool_3x3~1 "
            "max_pool_3x3~0 skip_connect~2 skip_connect~2 max_pool_3x3~1",
        ),
    }
)
"""What the authors of DARTS found on CIFAR-10, by the first and by the second order."""


def read_genotype(text: str) -> Genotype:
    """Read a genotype.

    Args:
        text: A key of ``GENOTYPES``; a file; or the genotype itself. A file has it as JSON or as
            the paper's code prints it: ``Genotype(normal=[('sep_conv_3x3', 0), ...], ...)``.

    Raises:
        DataError: If there is no such file.
        SpecError: If it is no genotype, with what is wrong.

    Example:
        >>> read_genotype("darts-v2").normal[7]
        Edge(operation='dil_conv_3x3', node=2)
        >>> read_genotype(str(read_genotype("darts-v1"))) == read_genotype("darts-v1")
        True
    """
    if text in GENOTYPES:
        return GENOTYPES[text]
    where, path = "a genotype", genotype_file(text)
    if path is not None:
        if not path.suffix:
            raise SpecError(
                f"there is no genotype {printable(text)!r}; known are {', '.join(GENOTYPES)}, or "
                f"give a file that has {EXAMPLE}"
            )
        require_file(path)
        text, where = path.read_text(encoding="utf-8", errors="replace"), printable(path)
    return Genotype.checked(_values(text, where))


def genotype_file(text: str) -> Path | None:
    """The file that a genotype is named by; None if it is a known one, or written out."""
    is_written = text.lstrip().startswith(("Genotype", "{"))
    return None if is_written or text in GENOTYPES else Path(text).expanduser()


def _values(text: str, where: str) -> Mapping[str, Any]:
    """The arguments of ``Genotype(...)``, or the fields of JSON."""
    try:
        if text.lstrip().startswith("{"):
            found = json.loads(text)
            return {str(key): _tuples(value) for key, value in found.items()}
        start = text.index("Genotype(")
        call: Any = ast.parse(text[start:].strip(), mode="eval").body
        return {str(argument.arg): _tuples(_literal(argument.value)) for argument in call.keywords}
    except (ValueError, SyntaxError, AttributeError) as error:
        raise SpecError(
            f"{where} is given as {printable(shortened(text.strip(), 60))!r}, which is no genotype "
            f"({shortened(error)}); write {EXAMPLE}"
        ) from error


def _literal(node: ast.expr) -> Any:
    """A value, where ``range(...)`` stands for its numbers."""
    match node:
        case ast.Call(func=ast.Name(id="range"), args=arguments):
            return [*range(*map(ast.literal_eval, arguments))]
        case _:
            return ast.literal_eval(node)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def derived(normal: Float[Tensor, "14 8"], reduce: Float[Tensor, "14 8"]) -> Genotype:
    """Keep the strongest operation of an edge, and the two strongest edges of a node.

    An edge is as strong as its strongest operation; ``none`` is not counted. Of equally strong
    ones the first is taken.

    Args:
        normal: Weight of each operation on each edge, as ``EDGES`` and ``OPERATIONS`` order them.
        reduce: Likewise.

    Source:
        Liu et al. 2019, section 2.4.
    """
    return Genotype.checked({"normal": _strongest(normal), "reduce": _strongest(reduce)})


def _strongest(weights: Float[Tensor, "14 8"]) -> tuple[Edge, ...]:
    best, operations = weights[:, 1:].max(1)
    found: list[Edge] = []
    for node in range(NUM_INPUTS, NUM_INPUTS + NUM_NODES):
        into = [at for at, (end, _) in enumerate(EDGES) if end == node]
        strong = sorted(into, key=lambda at: -float(best[at]))[:EDGES_PER_NODE]
        found += [Edge(OPERATIONS[1 + int(operations[at])], EDGES[at][1]) for at in strong]
    return tuple(found)
