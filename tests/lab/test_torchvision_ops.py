import importlib
import itertools
import math

import pytest
import torch

from normkit.lab.torchvision_ops import (
    non_maximum_suppression,
    register_missing_operators,
    roi_align,
    serve_detection,
)


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def kept_by_definition(boxes, scores, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def test_suppression_matches_its_definition():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.1 + torch.rand(40, 2, generator=generator)], 1)
    scores = torch.rand(40, generator=generator)
    expected = kept_by_definition(boxes.tolist(), scores.tolist(), 0.4)
    assert 1 < len(expected) < 40
    assert non_maximum_suppression(boxes, scores, 0.4).tolist() == expected


def test_no_boxes_are_kept_of_none():
    assert non_maximum_suppression(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


def test_torchvision_and_timm_import_after_registration():
    register_missing_operators()
    assert "resnet18" in importlib.import_module("torchvision.models").list_models()
    assert importlib.import_module("timm").is_model("resnet18")


def test_the_operator_is_there_whoever_declared_it():
    register_missing_operators()
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0.9], [2, 2, 3, 3]])
    scores = torch.tensor([0.5, 0.9, 0.1])
    assert torch.ops.torchvision.nms(boxes, scores, 0.5).tolist() == [1, 2]


def interpolated(plane, y, x):
    """One point of a map, by the definition: nothing beyond a pixel outside, else bilinear."""
    height, width = len(plane), len(plane[0])
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    ly, lx = y - top, x - left
    corners = ((top, left, (1 - ly) * (1 - lx)), (top, left + 1, (1 - ly) * lx))
    corners += ((top + 1, left, ly * (1 - lx)), (top + 1, left + 1, ly * lx))
    return sum(weight * plane[row][column] for row, column, weight in corners)


def cell_by_definition(plane, roi, cell, size, options):
    """The mean of the points of one cell, whose corners are in the map's pixels."""
    scale, ratio, aligned = options
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (value * scale - shift for value in roi)
    height, width = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
    step_y, step_x = height / size[0], width / size[1]
    rows = ratio if ratio > 0 else max(1, math.ceil(step_y))
    columns = ratio if ratio > 0 else max(1, math.ceil(step_x))
    total = 0.0
    for i in range(rows):
        for j in range(columns):
            y = y1 + step_y * (cell[0] + (i + 0.5) / rows)
            x = x1 + step_x * (cell[1] + (j + 0.5) / columns)
            total += interpolated(plane, y, x)
    return total / (rows * columns)


REGIONS = [
    (0, 2.0, 3.0, 17.0, 21.0),
    (1, -9.0, -6.0, 12.0, 30.0),  # reaches over the upper left border
    (1, 30.0, 20.0, 70.0, 60.0),  # and over the lower right one
    (0, 5.0, 5.0, 5.5, 5.2),  # smaller than a pixel of the map
]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, 3, -1])
def test_regions_match_their_definition(ratio, aligned):
    x = torch.randn(2, 2, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    regions = torch.tensor(REGIONS, dtype=torch.float64)
    found = roi_align(x, regions, (3, 2), 0.25, ratio, aligned)
    for k, (image, *corners) in enumerate(REGIONS):
        for c, r, s in itertools.product(range(2), range(3), range(2)):
            plane, options = x[image, c].tolist(), (0.25, ratio, aligned)
            expected = cell_by_definition(plane, corners, (r, s), (3, 2), options)
            assert found[k, c, r, s].item() == pytest.approx(expected, abs=1e-12)


def test_gradients_of_regions_are_those_of_their_definition():
    x = torch.randn(2, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    regions = torch.tensor(REGIONS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, regions, 2, 0.25, 2), (x,))


def test_regions_of_half_precision_are_computed_in_single():
    x = torch.randn(1, 1, 6, 6)
    regions = torch.tensor([[0.0, 1, 1, 20, 20]])
    with torch.autocast("cpu", torch.bfloat16):
        found = roi_align(x.bfloat16(), regions, 2, 0.25, 2)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, roi_align(x.bfloat16().float(), regions, 2, 0.25, 2).bfloat16())


def test_no_region_is_cut_out_of_none():
    assert roi_align(torch.zeros(1, 3, 4, 4), torch.zeros(0, 5), (7, 5)).shape == (0, 3, 7, 5)


def test_a_chain_of_boxes_is_suppressed_one_by_one():
    left = torch.arange(12.0)[:, None]
    boxes = torch.cat([left, torch.zeros(12, 1), left + 3, torch.ones(12, 1)], 1)
    scores = torch.linspace(1, 0, 12)
    expected = kept_by_definition(boxes.tolist(), scores.tolist(), 0.4)
    assert expected == [0, 2, 4, 6, 8, 10]
    assert non_maximum_suppression(boxes, scores, 0.4).tolist() == expected


def test_detectors_train_and_detect_without_the_compiled_operators():
    serve_detection()
    detection = importlib.import_module("torchvision.models.detection")
    model = detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    target = {
        "boxes": torch.tensor([[8.0, 8, 40, 40]]),
        "labels": torch.tensor([1]),
        "masks": masks,
    }
    losses = model(images, [target, target])
    assert {"loss_mask", "loss_box_reg", "loss_objectness"} <= losses.keys()
    sum(losses.values()).backward()
    found = model.eval()(images)
    assert [set(each) for each in found] == [{"boxes", "labels", "scores", "masks"}] * 2
