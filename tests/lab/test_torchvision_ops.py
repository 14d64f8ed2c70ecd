import importlib

import torch

from normkit.lab.torchvision_ops import non_maximum_suppression, register_missing_operators


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
