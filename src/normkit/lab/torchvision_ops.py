"""Lets `import torchvision` work beside a torch build that its compiled operators do not fit.

torchvision's wheels are built for CUDA. Beside a CPU build of torch their library does not
load, and `import torchvision` fails with ``operator torchvision::nms does not exist``. Two
operators are looked up while importing, so those two are declared here, in plain torch. Import
this module before torchvision or timm.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float, Int
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
    overlaps = _intersection_over_union(boxes[order]) > iou_threshold
    kept = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[kept]


def _intersection_over_union(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n n"]:
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    intersection = sides.clamp(min=0).prod(-1)
    area = (high - low).prod(-1)
    return intersection / (area[:, None] + area - intersection)
