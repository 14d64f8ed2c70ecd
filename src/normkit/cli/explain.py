"""`normkit explain`: draws which elements of a feature map share statistics."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.text import Text
from torch import nn

from normkit.cli.options import Json
from normkit.cli.shared import print_json, require_counts, require_file_name, whole_numbers
from normkit.cli.streams import Terminal
from normkit.errors import SpecError
from normkit.explain import Explanation, explain
from normkit.lab.drawing import panels_of
from normkit.lab.drawing.terminal import draw_lines
from normkit.recipes import MAX_NUMBER, METHODS
from normkit.spec import SIZES, NormSpec

MAX_ELEMENTS = 2**24  # the numbers of their groups take 128 MB
PICTURES = (".png", ".svg")


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Draw a feature map with the elements that share statistics in one colour.

    A letter and a colour stand for a group. Examples (n) go down, channels (c) to the right; a
    block holds the positions of one channel. A layer of several norms has one drawing for each.
    """

    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
    """The norm: bn, gn:4, bgn:8, ghost:2, gbgn:4:examples=2, bcn:4:micro, ..."""
    shape: str = "4,8,6,6"
    """Shape of the map, separated by commas: examples, channels, spatial sizes."""
    num_groups: int | None = None
    """Number of groups, if the spec does not contain it."""
    eval: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Explain evaluation instead of training."""
    out: Path | None = None
    """File for a picture: its name ends in .png or .svg."""
    json_output: Json = False
    """Print the groups as JSON, and nothing else, to the standard output."""

    def run(self) -> int:
        """Print the drawing and the explanation, and write the picture.

        Returns:
            0.

        Raises:
            SpecError: If an option breaks its rule.
            PartitionError: If the groups do not divide the map, or the layer refuses it.
        """
        layer, x = self._layer(), torch.randn(self._shape())
        explanation = explain(layer, x)
        with torch.no_grad():
            layer(x)  # raises an error if the layer does not take such an input
        if self.out is not None:
            require_file_name(self.out, "--out", *PICTURES)
            self._write(layer, self.out)
        if self.json_output:
            print_json(self._as_json(layer, explanation))
        else:
            self._print(layer, explanation)
        return 0

    def _layer(self) -> nn.Module:
        num_examples, num_channels, *spatial = self._shape()
        layer = self._spec().norm_alone.build(
            num_channels, batch_size=num_examples, num_positions=math.prod(spatial)
        )
        return layer.train(not self.eval)

    def _shape(self) -> tuple[int, ...]:
        shape = whole_numbers("--shape", self.shape)
        if len(shape) < 2 or 0 in shape:
            raise SpecError(
                f"--shape was given {self.shape!r}; it has the numbers of examples and channels "
                f"and the sizes of the map, all 1 or more, such as 4,8,6,6"
            )
        if math.prod(shape) > MAX_ELEMENTS:
            raise SpecError(
                f"--shape was given {self.shape!r}, a map of {math.prod(shape)} elements; at most "
                f"{MAX_ELEMENTS} are numbered; give fewer examples or a smaller map"
            )
        return shape

    def _spec(self) -> NormSpec:
        spec = NormSpec.parse(self.spec)
        if self.num_groups is None:
            return spec
        require_counts(self, "num_groups", at_most=MAX_NUMBER)
        with_groups = [n for n, recipe in METHODS.items() if recipe.argument == "num_groups"]
        if spec.name not in with_groups:
            raise SpecError(
                f"--num-groups was given with {spec}, which has no number of groups; "
                f"these have: {', '.join(with_groups)}"
            )
        if set(SIZES) & dict(spec.arguments).keys():
            raise SpecError(
                f"--num-groups was given with {spec}, which says the groups itself; "
                f"give {spec.name} --num-groups {self.num_groups}, or {spec} alone"
            )
        return replace(spec, arguments=(("", self.num_groups), *spec.arguments))

    @property
    def _mode(self) -> str:
        return "evaluation" if self.eval else "training"

    def _print(self, layer: nn.Module, explanation: Explanation) -> None:
        console = Terminal()
        for panel in panels_of(layer, self._shape()):
            console.print(Text(panel.title, style="bold"))
            for line in draw_lines(panel, console.width):
                console.print(line, no_wrap=True)
        console.print(Text(str(explanation)))
        if self._spec().standardize_weights:
            console.print("+ws standardizes the weights before the norm, filter by filter.")

    def _write(self, layer: nn.Module, path: Path) -> None:
        from normkit.lab.drawing.figure import write_figure  # matplotlib is slow

        shape = self._shape()
        write_figure(path, panels_of(layer, shape), f"{self._spec()}, {shape}, {self._mode}")
        sys.stderr.write(f"picture: {path}\n")

    def _as_json(self, layer: nn.Module, explanation: Explanation) -> dict[str, object]:
        shape = self._shape()
        return {
            "spec": str(self._spec()),
            "layer": repr(layer),
            "shape": shape,
            "mode": self._mode,
            "groups": explanation.groups,
            "kernels": explanation.kernels,
            "reason": explanation.reason,
            "parts": [
                {
                    "name": part.name,
                    "origin": part.origin,
                    "share": part.share,
                    "index": part.index(shape).tolist(),
                }
                for part in explanation.parts
            ],
        }
