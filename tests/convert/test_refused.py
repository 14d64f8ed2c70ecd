"""Layers and models that conversion refuses, and what it says."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import normkit as nk
from convert.networks import timm

REFUSED = {
    "a subclass": (type("MyNorm", (nn.BatchNorm2d,), {})(6), "MyNorm has no rule"),
    "a subclass of ours": (type("PairNorm", (nk.BatchNorm,), {})(6), "PairNorm has no rule"),
    "RMSNorm": (nn.RMSNorm(6), "RMSNorm has no rule; leave it out with where="),
    "EvoNorm": (timm.layers.EvoNorm2dS0(32), "EvoNorm2dS0 has no rule"),
    "lazy": (nn.LazyBatchNorm2d(), "LazyBatchNorm2d does not know .* send one batch"),
    "lazy, bare": (
        nn.LazyInstanceNorm2d(affine=False, track_running_stats=False),
        "LazyInstanceNorm2d has no rule",
    ),
    "LayerNorm over maps": (
        nn.LayerNorm((6, 5)),
        r"over axes of shape \(6, 5\); only a layer norm over the cha",
    ),
}


@pytest.mark.parametrize(("layer", "why"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_not_known_is_refused_by_name(layer, why):
    model = nn.Sequential(nn.BatchNorm2d(6), nn.Sequential(layer))
    with pytest.raises(
        nk.ConversionError, match=f"1 layer cannot .* nothing was ch[^1]*1.0 .*{why}"
    ):
        nk.convert_norm_(model, "gn:2")
    assert type(model[0]) is nn.BatchNorm2d
    left = nk.convert_norm_(model, {"1.0": None, "*": "gn:2"}).left
    assert [(row.name, row.why) for row in left] == [("1.0", "'1.0' leaves it alone")]


def test_layers_that_somebody_has_changed_are_refused():
    pruned = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    prune.l1_unstructured(pruned[1], "weight", 0.5)
    with pytest.raises(
        nk.ConversionError, match=r"1 to gn:4: its weight is not a parameter but comp"
    ):
        nk.convert_norm_(pruned, "gn:4")
    prune.remove(pruned[1], "weight")
    nk.convert_norm_(pruned, "gn:4").model(torch.randn(2, 3, 4, 4))
    patched = nn.Sequential(nn.BatchNorm2d(8))
    patched[0].forward = lambda x: x
    with pytest.raises(nk.ConversionError, match="0 to gn:4: its forward was replaced on this"):
        nk.convert_norm_(patched, "gn:4")


def test_a_parametrised_norm_is_refused_with_the_way_out():
    model = nn.Sequential(nn.BatchNorm2d(8))
    parametrizations.weight_norm(model[0])
    says = r"0 to gn:4: its weight is parametrised; make it permanent first \(.*remove_parametriz"
    with pytest.raises(nk.ConversionError, match=says):
        nk.convert_norm_(model, "gn:4")
    parametrize.remove_parametrizations(model[0], "weight")
    nk.convert_norm_(model, "gn:4")


def test_what_is_no_model_is_refused():
    with pytest.raises(
        nk.InputTypeError, match=r"a dict was given to convert; it takes a torch\.nn\.Module"
    ):
        nk.convert_norm_({}, "gn:4")
