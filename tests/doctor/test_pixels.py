"""The doctor on segmenters, whose targets are maps of classes."""

import math

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.doctor.pixels import are_of_segmenters, loss_of_pictures
from normkit.errors import DataError


def loss_by_definition(scores, target):
    """Pixel by pixel, in Python's own floats."""
    losses = []
    for y in range(target.shape[0]):
        for x in range(target.shape[1]):
            label = int(target[y, x])
            if label not in (255, -100):
                values = scores[:, y, x].tolist()
                losses.append(math.log(sum(map(math.exp, values))) - values[label])
    return sum(losses) / len(losses) if losses else 0.0


def maps():
    target = torch.randint(3, (4, 5, 6), generator=torch.Generator().manual_seed(0))
    target[0, :2], target[1, 0, 0], target[2] = 255, -100, 255
    return target


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_loss_is_the_mean_over_the_pixels_that_count(dtype):
    scores, target = torch.randn(4, 3, 5, 6, dtype=torch.float64), maps().to(dtype)
    expected = [loss_by_definition(*pair) for pair in zip(scores, target, strict=True)]
    assert expected[2] == 0 < min(expected[0], expected[1], expected[3])
    for output in (scores, {"out": scores, "aux": None}):
        assert loss_of_pictures(output, (None, target)).tolist() == pytest.approx(expected)


def test_255_is_a_class_where_there_are_so_many():
    scores = torch.zeros(1, 256, 1, 2)
    scores[0, 255, 0, 0] = 9
    found = loss_of_pictures(scores, (None, torch.tensor([[[255, 255]]])))
    assert found.item() == pytest.approx((math.log(255 + math.exp(9)) - 9 + math.log(256)) / 2)


@pytest.mark.parametrize(
    ("output", "target", "complaint"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4), r"gave \(1, 3, 2, 2\) for maps of classes"),
        ({"scores": 1}, torch.zeros(1, 4, 4), r"gave dict .*or as 'out'; else pass loss="),
        (torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 7), r"a map has the class 7, .*3 classes"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(output, target, complaint):
    with pytest.raises(DataError, match=complaint):
        loss_of_pictures(output, (None, target.long()))


def test_batches_are_told_apart():
    pictures = torch.zeros(2, 3, 4, 4)
    assert are_of_segmenters([(pictures, torch.zeros(2, 4, 4, dtype=torch.uint8))])
    for other in ([], [pictures], [(pictures, torch.zeros(2).long())], [(pictures, pictures)]):
        assert not are_of_segmenters(other)


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return {"out": self.head(self.body(x))}


def test_a_segmenter_is_diagnosed_by_its_pixels_without_being_told_how():
    torch.manual_seed(0)
    model = Segmenter()
    data = [(torch.randn(4, 3, 5, 6), maps()) for _ in range(4)]
    nk.recalibrate(model, data).apply()
    model.body[1].running_mean.fill_(50)
    found = nk.diagnose(model, data, data)
    with torch.no_grad():
        scores = torch.cat([model.eval()(pictures)["out"] for pictures, _ in data])
    targets = torch.cat([target for _, target in data])
    losses = [loss_by_definition(*pair) for pair in zip(scores, targets, strict=True)]
    state = next(state for state in found.states if state.name == "as the model is")
    assert state.loss == pytest.approx(sum(losses) / 16, rel=1e-5)
    assert state.accuracy is None
    assert max(found.layers, key=lambda row: row.mean_shift).name == "body.1"
