"""The cells of a genotype as a picture."""

from pathlib import Path
from typing import Any

from normkit.lab.figures import FONT_SIZE, INK, STYLES, figure_file
from normkit.lab.models.genotype import NUM_INPUTS, Genotype, Kind

Point = tuple[float, float]
TITLES: dict[Kind, str] = {"normal": "normal cell", "reduce": "reduction cell"}
INPUTS = ("cell k-2", "cell k-1")
COLUMN = 2.6  # distance of two nodes
LABELS_ALONG = (0.5, 0.4, 0.6, 0.3, 0.7)  # where labels may be on an arrow
LABEL_SIZE = (1.2, 0.25)
HEIGHTS = (0.0, 1.5, -1.5, 0.75)  # of the cell's own nodes


def draw_genotype(genotype: Genotype, path: Path) -> None:
    """Draw both cells into a file whose name ends in .svg, .png or .pdf.

    An arrow is an operation on the output of one node; a node is the sum of its arrows, and the
    cell's output has the nodes side by side.

    Raises:
        DataError: If it cannot be written.
    """
    with figure_file(path, figsize=(11, 7), layout="constrained") as figure:
        for axes, kind in zip(figure.subplots(2, 1), TITLES, strict=True):
            _draw(axes, genotype, kind)


def _places(num_nodes: int) -> dict[int | str, Point]:
    places: dict[int | str, Point] = {0: (0.0, 1.5), 1: (0.0, -1.5)}
    for at in range(num_nodes):
        places[NUM_INPUTS + at] = (COLUMN * (at + 1), HEIGHTS[at])
    return places | {"out": (COLUMN * (num_nodes + 1), 0.0)}


def _draw(axes: Any, genotype: Genotype, kind: Kind) -> None:
    edges = genotype.edges(kind)
    places = _places(len(edges) // 2)
    taken = [*places.values()]  # where nodes and labels are
    colours = {o: STYLES[at % len(STYLES)][0] for at, o in enumerate(_operations(genotype))}
    for at, edge in enumerate(edges):
        node = NUM_INPUTS + at // 2
        ends = places[edge.node], places[node]
        rounding = 0.12 if at % 2 else -0.12  # two arrows between the same nodes are told apart
        _arrow(axes, ends, rounding, colours[edge.operation])
        place = max(
            (_on_curve(ends, rounding, along) for along in LABELS_ALONG),
            key=lambda place: min(_apart(place, other) for other in taken),
        )
        taken.append(place)
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
        axes.text(
            *place,
            edge.operation.replace("_", " "),
            ha="center",
            va="center",
            fontsize=FONT_SIZE - 1,
            bbox=box,
            color=colours[edge.operation],
            zorder=4,
        )
    for node in genotype.concat(kind):
        _arrow(axes, (places[node], places["out"]), 0.0, "#9aa0a6", dashed=True)
    for node, (x, y) in places.items():
        name = "cell k" if node == "out" else _name(node)
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": INK}
        axes.text(x, y, name, ha="center", va="center", bbox=box, zorder=5)
    axes.set_title(TITLES[kind], fontsize=FONT_SIZE + 1)
    axes.set_xlim(-0.8, places["out"][0] + 0.9)
    axes.set_ylim(-2.2, 2.2)
    axes.axis("off")


def _name(node: int | str) -> str:
    return INPUTS[int(node)] if int(node) < NUM_INPUTS else str(node)


def _operations(genotype: Genotype) -> list[str]:
    return sorted({edge.operation for edge in (*genotype.normal, *genotype.reduce)})


def _arrow(
    axes: Any, ends: tuple[Point, Point], rounding: float, colour: str, *, dashed: bool = False
) -> None:
    style = {
        "arrowstyle": "-|>",
        "color": colour,
        "connectionstyle": f"arc3,rad={rounding}",
        "shrinkA": 16,
        "shrinkB": 14,
        "linestyle": "--" if dashed else "-",
    }
    axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=style, zorder=1)


def _apart(a: Point, b: Point) -> float:
    """How far two labels are apart, as a share of a label's width or height."""
    return max(abs(a[0] - b[0]) / LABEL_SIZE[0], abs(a[1] - b[1]) / LABEL_SIZE[1])


def _on_curve(ends: tuple[Point, Point], rounding: float, along: float) -> Point:
    """The point at a share of an arrow, which is a quadratic curve with one control point."""
    (x0, y0), (x1, y1) = ends
    x = (x0 + x1) / 2 + rounding * (y1 - y0)
    y = (y0 + y1) / 2 - rounding * (x1 - x0)
    first, middle, last = (1 - along) ** 2, 2 * along * (1 - along), along**2
    return first * x0 + middle * x + last * x1, first * y0 + middle * y + last * y1
