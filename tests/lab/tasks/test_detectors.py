"""Where norms stand in detectors, and the library's tools on them."""

import copy
import importlib

import pytest
import torch
from torch import nn

import normkit as nk
from detectors import WithMasks, backbone, batches, built
from normkit.errors import SpecError
from normkit.lab.models.build import build_model
from normkit.lab.models.features import chosen_levels, levels_of, require_same_maps
from normkit.lab.torchvision_ops import serve_detection
from normkit.layers.base import NormLayer

SHAPE = (1, 32, 32)


def norms_of(model, part):
    inside = model.get_submodule(part)
    kinds = (NormLayer, nn.BatchNorm2d)
    return [module for module in inside.modules() if isinstance(module, kinds)]


@pytest.mark.parametrize(
    ("norm", "where", "expected"),
    [
        ("gn:2", "backbone", (7, 0, 0, 0)),
        ("gn:2", "heads", (7, 0, 4, 4)),
        ("gn:2", "fpn+heads", (7, 4, 4, 4)),
        ("xbn/gn:2", "fpn+heads", (7, 4, 4, 4)),
        ("frozen-bn", "fpn+heads", (7, 0, 0, 0)),
    ],
)
def test_norms_stand_where_a_table_says(norm, where, expected):
    found = built(norm, WithMasks, head="4conv1fc", norms=where)
    parts = ("backbone.body", "backbone.fpn", "roi_heads.box_head", "roi_heads.mask_head")
    assert tuple(len(norms_of(found.model, part)) for part in parts) == expected
    assert [place.name for place in found.norms][:1] == ["backbone.body.1"]
    assert len(found.norms) == sum(expected)
    outer = [place.norm for place in found.norms if not place.name.startswith("backbone.body")]
    assert set(outer) <= {"gn:2"}
    names = {name for name, _ in found.model.named_modules()}
    assert {place.name for place in found.norms} <= names


def test_convolutions_before_norms_are_standardized_in_heads_too():
    found = built("gn:2+ws", WithMasks, head="4conv1fc", norms="heads")
    parts = {name.rpartition(".")[0].partition(".")[0] for name in found.standardized}
    assert parts == {"backbone", "roi_heads"}
    assert len(found.standardized) == 15


def test_a_head_of_two_linear_layers_has_no_norm():
    found = built("gn:2", head="2fc", norms="fpn+heads")
    assert not norms_of(found.model, "roi_heads")
    assert len(norms_of(found.model, "backbone.fpn")) == 4


@pytest.mark.parametrize(("freeze", "moves"), [(True, False), (False, True)])
def test_statistics_of_the_backbone_stand_still_if_asked_for(freeze, moves):
    model = built("xbn/gn:2", freeze=freeze).model.train()
    before = model.backbone.body.get_submodule("1").running_mean.clone()
    ((images, targets),) = batches(1)
    sum(model(images, targets).values()).backward()
    after = model.backbone.body.get_submodule("1").running_mean
    assert bool((before != after).any()) == moves


def test_equal_seeds_give_equal_weights_whatever_the_norm():
    one, other = built("bn").model.state_dict(), built("gn:2").model.state_dict()
    same = [name for name in one if name.endswith("conv1.weight") or "fc6" in name]
    assert len(same) >= 4
    assert all(torch.equal(one[name], other[name]) for name in same)


def test_levels_are_the_last_maps_of_each_size():
    levels = levels_of(backbone("bn").model, SHAPE, "mine")
    assert [(level.stride, level.shape) for level in levels] == [
        (1, (4, 32, 32)), (2, (8, 16, 16)), (4, (16, 8, 8)), (8, (32, 4, 4)),
    ]  # fmt: skip
    assert [level.stride for level in chosen_levels(levels, 4, "mine")] == [4, 8]
    with pytest.raises(SpecError, match=r"gives maps of strides 1, 2, 4, 8, and a pyramid takes"):
        chosen_levels(levels, 8, "mine")


def test_a_resnet_of_torchvision_gives_four_levels():
    model = build_model("torchvision:resnet18", num_classes=10, input_shape=(3, 64, 64)).model
    levels = chosen_levels(levels_of(model, (3, 64, 64), "resnet18"), 4, "resnet18")
    assert [level.name for level in levels] == ["layer1", "layer2", "layer3", "layer4"]
    serve_detection()
    assert list(require_same_maps(model, levels, (3, 64, 64), "resnet18").values()) == list("0123")


class Around(nn.Module):
    """Adds what comes in to what comes out, which its parts do not show."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, 2, padding=1)

    def forward(self, x):
        return self.two(x + self.one(x))


def test_a_network_that_does_more_than_its_parts_is_refused():
    serve_detection()
    model = Around()
    levels = levels_of(model, SHAPE, "mine")
    with pytest.raises(SpecError, match=r"forward of model mine does more than to call its parts"):
        require_same_maps(model, levels, SHAPE, "mine")
    with pytest.raises(SpecError, match=r"model mine has no parts that give feature maps"):
        levels_of(nn.Flatten(), SHAPE, "mine")


def test_tools_take_the_batches_of_a_detector():
    model, data = built("bn", head="4conv1fc", norms="fpn+heads").model, batches(3)
    pairs_of_tuples = [(tuple(images), tuple(targets)) for images, targets in data]
    report = nk.recalibrate(model, pairs_of_tuples)
    mean = model.backbone.body.get_submodule("1").running_mean.clone()
    report.apply()
    assert not torch.equal(mean, model.backbone.body.get_submodule("1").running_mean)
    images_only = [images for images, _ in data]
    assert len(nk.recalibrate(model, images_only).layers) == len(report.layers)
    found = nk.validate(model, batch_size=2, example_input=(images_only[0],))
    assert any("2 examples" in str(finding) for finding in found)
    assert len(nk.place_xbn_(copy.deepcopy(model), norm="gn:2").changes) == 3


@pytest.mark.parametrize("form", ["pairs", "tuples", "images"])
def test_weights_are_standardized_without_an_example_where_there_are_batches(form):
    data = batches(2)
    given = {
        "pairs": data,
        "tuples": [(tuple(images), tuple(targets)) for images, targets in data],
        "images": [images for images, _ in data],
    }[form]
    report = nk.convert_norm_(built("bn").model, "gn:2+ws", calibrate=given)
    assert len(report.changes) == len(report.standardized) == 7


def test_frozen_norms_of_a_pretrained_detector_become_group_norms():
    model, data = built("bn").model.eval(), batches(2)
    frozen = importlib.import_module("torchvision.ops.misc").FrozenBatchNorm2d
    for name, module in list(model.named_modules()):
        if isinstance(module, NormLayer):
            model.set_submodule(name, frozen(module.num_features))
    report = nk.convert_norm_(model, "gn:2+ws", calibrate=data)
    assert {change.old for change in report.changes} == {
        f"FrozenBatchNorm2d({size})" for size in (4, 8, 16, 32)
    }
    assert len(model(data[0][0])) == 2


def test_a_probe_watches_the_training_of_a_detector():
    model = built("bn").model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    probe = nk.Probe(model, every=1)
    with probe:
        for images, targets in batches(2):
            optimizer.zero_grad()
            sum(model(images, targets).values()).backward()
            optimizer.step()
            probe.step()
    assert "2 recorded" in str(probe)


def test_the_doctor_judges_a_detector_by_its_losses_or_by_a_function():
    model, data = built("bn").model, batches(2, size=4)
    found = nk.diagnose(model, data, data)
    assert found.num_judged == 8

    def missed(found, batch):
        pairs = zip(found, batch[1], strict=True)
        numbers = [len(target["labels"]) - len(own["labels"]) for own, target in pairs]
        return torch.tensor(numbers, dtype=torch.float64).abs()

    assert nk.diagnose(model, data, data, loss=missed).num_judged == 8
