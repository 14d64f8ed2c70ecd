"""Lets `import torchvision` work beside a torch build that its compiled operators do not fit.

torchvision's wheels are built for CUDA. Beside a CPU build of torch their library does not
load, and `import torchvision` fails with ``operator torchvision::nms does not exist``. Two
operators are looked up while importing, so those two are declared here, in plain torch. Import
this module before torchvision or timm.

Detection models call ``nms`` and ``roi_align`` through functions that refuse to work without the
compiled library; :func:`serve_detection` lets these call the operators of this module.
"""

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def register_missing_operators() -> tuple[torch.library.Library, ...]:
    """Declare ``torchvision::nms`` and ``qnms`` where the compiled ones are absent.

    Returns:
        The libraries that hold the declarations: none if the compiled operators load.
    """
    if _compiled_operators_load():
        return ()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(SCHEMA.format(name))
        library.impl(name, non_maximum_suppression, "CompositeExplicitAutograd")
    return (library,)


@cache
def serve_detection() -> None:
    """Let torchvision's detection models work where the compiled operators are absent.

    Its ``nms`` and ``roi_align`` then no longer ask whether the compiled library is there. The
    others, such as ``deform_conv2d``, still do.
    """
    missing = register_missing_operators()
    importlib.import_module("torchvision.ops")
    if missing:
        boxes, regions = (sys.modules[f"torchvision.ops.{name}"] for name in ("boxes", "roi_align"))
        vars(boxes)["_assert_has_ops"] = lambda: None
        vars(regions)["_roi_align"] = _roi_align  # theirs is compiled anew for many shapes


def _compiled_operators_load() -> bool:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    # _C.so, and since 0.29 _C_stable.so: declaring what is loaded later would end the process
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
    return hasattr(torch.ops.torchvision, "nms")


def non_maximum_suppression(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], iou_threshold: float
) -> Int[Tensor, " kept"]:
    """Keep each box unless a better one that is kept overlaps it by more than the threshold.

    Args:
        boxes: Corners ``(x1, y1, x2, y2)``.
        scores: What makes one box better than another.
        iou_threshold: Intersection over union from which on a box is dropped.

    Returns:
        Indices of the kept boxes, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    suppresses = (_intersection_over_union(boxes[order]) > iou_threshold).triu(1)
    return order[_fixed_point(suppresses)]


def _fixed_point(suppresses: Bool[Tensor, "n n"]) -> Bool[Tensor, " n"]:
    """Which boxes are kept, if each suppresses later ones.

    Whether a box is kept depends on earlier boxes only. So a first round is right for the first
    box, and each round for one box more at least; what no longer changes is right.
    """
    kept = torch.ones(len(suppresses), dtype=torch.bool, device=suppresses.device)
    while True:
        again = ~(suppresses & kept[:, None]).any(0)
        if torch.equal(again, kept):
            return kept
        kept = again


def _intersection_over_union(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n n"]:
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    intersection = sides.clamp(min=0).prod(-1)
    area = (high - low).prod(-1)
    return intersection / (area[:, None] + area - intersection)


def roi_align(
    input: Float[Tensor, "n c h w"],
    boxes: Float[Tensor, "k 5"],
    output_size: tuple[int, int] | list[int] | int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Float[Tensor, "k c a b"]:
    r"""Cut regions out of feature maps: each cell is the mean of interpolated points in it.

    Bilinear interpolation and the mean over a grid of points are both sums over rows of sums over
    columns. So a region is :math:`R\,X\,C^T`, with the map :math:`X`, and two small matrices that
    hold how much each row and each column of the map counts for a cell.

    Args:
        input: Feature maps.
        boxes: Number of the map, then corners ``(x1, y1, x2, y2)`` of the region.
        output_size: Rows and columns of cells.
        spatial_scale: What corners are multiplied by to be in the map's pixels.
        sampling_ratio: Points of a cell along each axis; with 0 or less as many as a cell has
            pixels, rounded up.
        aligned: Whether pixel centres lie at halves; otherwise regions are a pixel large at least.

    Returns:
        A map for each region; gradients flow to the input and not to the boxes.

    Numerics:
        Computed in float32 at least.

    Source:
        He et al. 2017, Mask R-CNN, arXiv:1703.06870, section 3; torchvision's ``roi_align``.
    """
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    rois = boxes.detach().to(x.dtype)
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    lengths = corners[:, 2:] - corners[:, :2]
    lengths = lengths if aligned else lengths.clamp(min=1)
    columns, rows = (
        _shares(corners[:, at], lengths[:, at], size[1 - at], x.shape[3 - at], sampling_ratio)
        for at in (0, 1)
    )
    found = x.new_zeros(len(rois), x.shape[1], *size)
    with torch.autocast(x.device.type, enabled=False):
        for at in rois[:, 0].long().unique():
            chosen = (rois[:, 0].long() == at).nonzero().flatten()
            part = torch.einsum("krh,chw->kcrw", rows[chosen], x[at])
            found = found.index_copy(0, chosen, part @ columns[chosen, None].mT)
    return found.to(input.dtype)


def _roi_align(  # noqa: PLR0913 - as torchvision calls it
    input: Float[Tensor, "n c h w"],
    rois: Float[Tensor, "k 5"],
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Float[Tensor, "k c a b"]:
    size = (pooled_height, pooled_width)
    return roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned)


def _shares(
    start: Float[Tensor, " k"],
    length: Float[Tensor, " k"],
    num_cells: int,
    side: int,
    sampling_ratio: int,
) -> Float[Tensor, "k num_cells side"]:
    """How much each row of a map counts for each cell of a region, along one axis.

    Points more than a pixel outside of the map count nothing; others outside are those at its
    border.
    """
    if sampling_ratio > 0:
        number = torch.full_like(length, sampling_ratio)
    else:
        number = (length / num_cells).ceil().clamp(min=1)
    points = torch.arange(int(number.max()) if len(number) else 1, device=start.device)
    cells = torch.arange(num_cells, device=start.device)
    step = length / num_cells
    within = (points + 0.5) / number[:, None]
    at = start[:, None, None] + step[:, None, None] * (cells[:, None] + within[:, None])
    counts = (points < number[:, None])[:, None] & (at >= -1) & (at <= side)
    at = at.clamp(0, side - 1)
    pixels = torch.arange(side, device=start.device)
    weight = (1 - (at[..., None] - pixels).abs()).clamp(min=0) * counts[..., None]
    return weight.sum(2) / number[:, None, None]
