"""Recipes: the structure of a converted model, as JSON, and given to a new model."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normkit as nk
from convert.net import Net
from convert.networks import build, images
from normkit.convert.recipe import ConversionRecipe
from normkit.errors import NormError, OptionError, SpecError

X = torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def stepped(model):
    """Move parameters and buffers away from what a new model has."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


CONVERSIONS = {
    "all": lambda net: nk.convert_norm_(net, {"layer*": "gn:4", "head": "bn"}),
    "by pattern": lambda net: nk.convert_norm_(net, {"layer1.*": "bcn:2", "*": "gnplus:max=3"}),
    "auto": lambda net: nk.convert_norm_(net, "bgn:auto", batch_size=6, where=is_map),
    "ws": lambda net: nk.convert_norm_(net, {"layer2": "gn:2+ws", "*": None}),
    "preserved": lambda net: nk.convert_norm_(net, {"layer1": "ibn+ws", "*": None}, calibrate=[X]),
    "xbn": lambda net: nk.place_xbn_(net, norm="gn:2"),
    "gnbn": lambda net: nk.place_gnbn_(net, "gn:2"),
    "four things": lambda net: nk.four_things(net, 2, where=is_map).conversion,
}


def is_map(_, name):
    return name != "head.1"


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_new_model_gets_the_structure_and_then_the_checkpoint(convert):
    done = convert(Net())
    trained = stepped(done.model).eval()
    text = json.dumps(done.recipe())
    again = nk.apply_recipe(Net(), text)
    assert [repr(m) for m in again.model.modules()] == [repr(m) for m in trained.modules()]
    again.model.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(again.model.eval()(X), trained(X))
    assert again.recipe() == done.recipe()


@pytest.mark.parametrize("variant", ["a", "b"])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_norms_after_sums_come_back(name, variant):
    done = nk.place_ibn_(build(name), variant)
    recipe = done.recipe()
    assert ("after_sum" in recipe) == (variant == "b")
    again = nk.apply_recipe(build(name), json.loads(json.dumps(recipe)))
    again.model.load_state_dict(done.model.state_dict(), strict=True)
    x = images(name, 2)
    assert torch.equal(again.model.eval()(x), done.model.eval()(x))


def test_recipes_one_after_the_other():
    net, specs = Net(), ({"layer1": "gn:4", "*": None}, {"layer1.0.bn1": "in", "*": None})
    recipes = [nk.convert_norm_(net, spec).recipe() for spec in specs]
    new = Net()
    for recipe in recipes:
        nk.apply_recipe(new, recipe)
    assert [type(m) for m in new.modules()] == [type(m) for m in net.modules()]


def test_a_model_on_the_meta_device_gets_it_too():
    recipe = nk.convert_norm_(Net(), {"layer*": "bcn:4+ws", "*": None}).recipe()
    trained = stepped(nk.apply_recipe(Net(), recipe).model)
    with torch.device("meta"):
        empty = Net()
    new = nk.apply_recipe(empty, recipe).model
    assert all(p.is_meta for p in new.parameters())
    new.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(new.eval()(X), trained.eval()(X))


def test_twice_is_once_and_revert_undoes_it():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    recipe = nk.convert_norm(net, {"layer1": "gn:4+ws", "*": None}).recipe()
    first = nk.apply_recipe(net, recipe)
    kinds = [type(m) for m in net.modules()]
    assert not nk.apply_recipe(net, recipe).changes
    assert [type(m) for m in net.modules()] == kinds
    first.revert()
    assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_the_optimizer_follows():
    recipe = nk.convert_norm(Net(), {"layer1.0.bn1": "bcn:4", "*": None}).recipe()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    nk.apply_recipe(net, recipe, optimizer=optimizer)
    assert {*optimizer.param_groups[0]["params"]} == {*net.parameters()}


def test_a_module_dict_may_have_names_that_are_patterns():
    def make():
        return nn.ModuleDict({"b*": nn.BatchNorm2d(8), "bn": nn.BatchNorm2d(8)})

    recipe = nk.convert_norm_(make(), "gn:2", where=lambda _, name: name == "b*").recipe()
    new = nk.apply_recipe(make(), recipe).model
    assert [type(m).__name__ for m in new.values()] == ["GroupNorm", "BatchNorm2d"]


def test_a_norm_by_itself_is_a_model():
    recipe = nk.convert_norm_(nn.BatchNorm2d(8), "gn:2").recipe()
    assert recipe["norms"] == {"": "gn:2"}
    assert isinstance(nk.apply_recipe(nn.BatchNorm2d(8), recipe).model, nk.GroupNorm)


@pytest.mark.parametrize(
    ("recipe", "error", "said"),
    [
        ("{", OptionError, "'{' was given as a recipe, which is not JSON; pass what recipe"),
        ("[]", OptionError, r"'\[\]' was given as a recipe; pass what"),
        ({}, OptionError, "{} was given as a recipe"),
        ({"format": 2}, OptionError, "format 2 was given; this version of normkit reads format 1"),
        ({"format": 1, "norms": ["bn"]}, OptionError, "other parts than names and specs"),
        ({"format": 1, "norms": {"bn": 4}}, OptionError, "other parts than names and specs"),
        ({"format": 1, "standardized": "conv"}, OptionError, "lists of names under 'after_sum'"),
        ({"format": 1, "norm": {}}, OptionError, "other parts"),
        (
            {"format": 1, "norms": {"layer1.0.bn9": "gn:4", "layer1": "gn:4"}},
            OptionError,
            r"norms that the model does not have: layer1.0.bn9, layer1; build the model as it was",
        ),
        ({"format": 1, "norms": {"layer1.0.bn1": "nope"}}, SpecError, "names norm 'nope'"),
        ({"format": 1, "standardized": ["layer1"]}, OptionError, "convolutions that .*: layer1"),
        ({"format": 1, "after_sum": ["head"]}, OptionError, "residual blocks that .*: head"),
        ({"format": 1, "norms": {"layer1.0.bn1": "gn:3"}}, NormError, "3 groups do not divide"),
    ],
)
def test_what_is_no_recipe_for_this_model_is_refused_whole(recipe, error, said):
    net = Net()
    before = list(net.modules())
    with pytest.raises(error, match=said):
        nk.apply_recipe(net, recipe)
    assert list(net.modules()) == before


def test_reading_takes_what_writing_gave():
    given = ConversionRecipe(
        norms={"a": "bn"}, after_sum=("b",), standardized=("c", "d"), preserved=("d",)
    )
    assert ConversionRecipe.read(json.dumps(given.as_dict())) == given
