"""Layers of a user's own under a name in specs."""

import copy
from typing import Literal

import pytest
import torch
from torch import nn

import normkit as nk
from normkit import recipes
from normkit.core.partition import Partition
from normkit.layers.base import NormLayer


class PairNorm(nk.GroupNorm):
    """Group normalization over two neighbouring examples."""

    @property
    def partition(self):
        return Partition(num_groups=self.num_groups, examples_per_group=2 if self.training else 1)


class Quarter(nk.BatchGroupNorm):
    """Another norm."""


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )


def by_definition(x, num_groups, eps=1e-5):
    groups = x.unflatten(0, (-1, 2)).unflatten(2, (num_groups, -1))
    var, mean = torch.var_mean(groups, dim=(1, 3, 4, 5), keepdim=True, correction=0)
    return ((groups - mean) / (var + eps).sqrt()).flatten(2, 3).flatten(0, 1)


def test_specs_take_the_name_with_the_options_of_the_class():
    nk.register_norm("pair", PairNorm)
    layer = nk.build("pair:max=3:eps=0.01", 8).double()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    assert type(layer) is PairNorm
    assert layer.num_groups == 2
    torch.testing.assert_close(layer(x), by_definition(x, 2, 0.01), rtol=1e-12, atol=1e-12)
    assert str(nk.NormSpec.parse("pair:4+ws")) == "pair:4+ws"
    with pytest.raises(nk.SpecError, match="sets 'weight_decay'; its options are: "):
        nk.build("pair:weight_decay=1", 8)


Mode = Literal["left", "right"]


class Options(nk.GroupNorm):
    """A norm whose options are written in every way that Python knows."""

    def __init__(
        self, num_features, *, num_groups: int = 4, noise: float = 0.1, mode: Mode = "left",
        place: "Literal['in', 'out']" = "in", text: str = "", plain=0.5, is_on: bool = False,
        **shared,
    ):  # fmt: skip
        super().__init__(num_features, num_groups=num_groups, **shared)
        self.noise, self.mode, self.place, self.text = noise, mode, place, text
        self.plain, self.is_on = plain, is_on


def test_options_are_read_by_their_annotation_or_default():
    nk.register_norm("options", Options)
    layer = nk.build("options:8:noise=0.5:mode=right:place=out:text=abc:plain=2:is_on", 16)
    found = (layer.num_groups, layer.noise, layer.mode, layer.place, layer.text, layer.plain)
    assert found == (8, 0.5, "right", "out", "abc", 2.0)
    assert layer.is_on
    with pytest.raises(nk.SpecError, match="'mode=up'; the value must be one of: left, right"):
        nk.build("options:mode=up", 16)
    with pytest.raises(nk.SpecError, match="'noise=x'; the value must be of type float"):
        nk.build("options:noise=x", 16)


def test_a_name_keeps_what_its_base_class_says_of_auto():
    nk.register_norm("quarter", Quarter)
    assert (
        nk.build("quarter:auto", 64, batch_size=8).num_groups
        == nk.build("bgn:auto", 64, batch_size=8).num_groups
    )


def test_a_model_is_converted_to_it_and_from_it():
    nk.register_norm("pair", PairNorm)
    model = net()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    there = nk.convert_norm(model, "pair:4").model
    assert type(there[1]) is PairNorm
    torch.testing.assert_close(there[1].weight, model[1].weight)
    back = nk.convert_norm(there, "gn:2").model
    assert type(back[4]) is nk.GroupNorm
    torch.testing.assert_close(back[1].weight, model[1].weight)
    x = torch.randn(4, 8, 5, 5)
    expected = by_definition(x.double(), 4) * model[1].weight.double().view(1, 8, 1, 1)
    torch.testing.assert_close(there[1](x).double(), expected, rtol=1e-5, atol=1e-5)


def test_other_tools_know_it():
    nk.register_norm("pair", PairNorm)
    layer = nk.build("pair:2", 8)
    assert nk.explain(layer, torch.randn(4, 8, 5, 5)).groups.startswith(
        "statistics over a group of 2 of 4"
    )
    placed = net()
    nk.place_gnbn_(placed, "pair:2")
    assert type(placed[1]) is PairNorm


def test_a_class_that_was_changed_is_registered_again():
    nk.register_norm("pair", PairNorm)
    changed = type("PairNorm", (PairNorm,), {"__qualname__": PairNorm.__qualname__})
    nk.register_norm("pair", changed)
    assert type(nk.build("pair:2", 8)) is changed


def test_without_its_name_a_class_of_ones_own_is_refused():
    with pytest.raises(nk.ConversionError, match="PairNorm has no rule"):
        nk.convert_norm(nn.Sequential(PairNorm(8, num_groups=2)), "bn")


class Abstract(NormLayer):
    """Lacks what every layer must say."""


@pytest.mark.parametrize(
    ("name", "layer", "match"),
    [
        ("gn", PairNorm, "'gn' was given as the name of PairNorm, but it means something else"),
        ("none", PairNorm, "'none' was given as the name of PairNorm"),
        ("Pair", PairNorm, "'Pair' was given as the name of a norm; it must be"),
        ("a:b", PairNorm, "'a:b' was given"),
        (3, PairNorm, "3 was given as the name"),
        ("pair", nn.BatchNorm2d, "'BatchNorm2d' was given as norm 'pair'; it must be a class that"),
        ("pair", Abstract, "'Abstract' was given as norm 'pair'"),
        ("pair", "PairNorm", "'PairNorm' was given as norm 'pair'"),
    ],
)
def test_what_cannot_be_registered_changes_nothing(name, layer, match):
    before = copy.copy(recipes._METHODS)
    with pytest.raises(nk.SpecError, match=match):
        nk.register_norm(name, layer)
    assert before == recipes._METHODS


def test_two_classes_do_not_share_a_name():
    nk.register_norm("pair", PairNorm)
    with pytest.raises(nk.SpecError, match="means something else"):
        nk.register_norm("pair", Quarter)
