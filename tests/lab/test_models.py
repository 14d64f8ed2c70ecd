import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from normkit import BatchNorm, GroupNorm, InstanceBatchNorm
from normkit.errors import ConversionError, OptionError, PartitionError, SpecError
from normkit.lab.models import ARCHITECTURES, build_model
from normkit.lab.models.architecture import architecture
from normkit.lab.models.build import norm_slots

OURS = ("small-resnet", "small-resnet:width=8:blocks=2", "mlp:depth=3:width=16", "vgg11")
OURS += ("wide-resnet:depth=10:width=1", "resnet12:width=4")
ZOO = (
    "torchvision:resnet18",  # takes norm_layer=
    "mobilenet_v3_small",  # a plain name; takes norm_layer= through nested blocks
    "shufflenet_v2_x0_5",  # torchvision, without norm_layer=
    "timm:resnet18",
    "timm:regnety_002",  # BatchNormAct2d
)


def build(name, norm=None, shape=(1, 16, 16), **options):
    return build_model(name, num_classes=10, input_shape=shape, norm=norm, **options)


def other_parameters(model):
    """Parameters of everything but norms, by name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {f"{n}.{k}": p for n, m in layers.items() for k, p in m.named_parameters()}


@pytest.mark.parametrize("name", OURS + ZOO)
def test_a_model_trains_a_step_with_another_norm_throughout(name):
    built = build(name, "gn:max=4", shape=(1, 32, 32))
    norms = [m for m in built.model.modules() if isinstance(m, GroupNorm)]
    assert len(norms) == len(built.norms) > 0
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in built.model.modules())
    scores = built.model(torch.randn(4, 1, 32, 32))
    assert scores.shape == (4, 10)
    scores.square().sum().backward()
    assert all(p.grad is not None for n in norms for p in n.parameters())


@pytest.mark.parametrize("name", OURS + ZOO)
def test_equal_seeds_give_equal_weights_whatever_the_norm(name):
    plain, one, other = (
        other_parameters(build(name, norm, shape=(1, 32, 32), seed=3).model)
        for norm in (None, "bn", "gn:2")
    )
    assert plain.keys() == one.keys() == other.keys()
    for key, value in plain.items():
        assert torch.equal(value, one[key]), key
        assert torch.equal(value, other[key]), key


def test_other_seeds_give_other_weights():
    one, other = (other_parameters(build("small-resnet", "bn", seed=s).model) for s in (1, 2))
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_building_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    build("small-resnet", "bn", seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_auto_is_resolved_by_batch_size_and_by_the_size_of_the_map():
    norms = {p.name: p for p in build("small-resnet", "bgn:auto", batch_size=128).norms}
    assert norms["1"].num_positions == 256
    assert [p.norm for p in norms.values()] == ["bgn:512"] * 5
    small = build("small-resnet:width=1", "bgn:auto", batch_size=128, shape=(1, 5, 5)).norms
    assert (small[0].norm, small[0].num_positions) == ("bgn:25", 25)
    two = build("small-resnet", "bgn:auto", batch_size=2).norms
    assert {p.norm for p in two} == {"bgn:1"}


def test_max_is_resolved_by_the_channels():
    norms = build("small-resnet:width=6", "gn:max=8").norms
    assert [p.norm for p in norms] == ["gn:6", "gn:6", "gn:6", "gn:8", "gn:8"]


def test_places_name_the_norms_in_the_model():
    built = build("timm:resnet18", "gn:8", shape=(3, 32, 32))
    for place in built.norms:
        assert isinstance(built.model.get_submodule(place.name), GroupNorm)
        assert place.num_features == built.model.get_submodule(place.name).num_features


def test_ws_standardizes_exactly_the_convolutions_that_feed_the_norm():
    built = build("timm:regnety_002", "gn:max=4+ws", shape=(3, 32, 32))
    touched = {n for n, m in built.model.named_modules() if is_parametrized(m)}
    convolutions = {n for n, m in built.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert touched == set(built.standardized)
    assert touched == {name for name in convolutions if ".se." not in name}
    assert {p.norm for p in built.norms} == {"gn:4+ws"}
    plain = build("timm:regnety_002", "gn:max=4", shape=(3, 32, 32)).model
    raw = built.model.stem.conv.parametrizations.weight.original
    assert torch.equal(raw, plain.stem.conv.weight)
    assert built.model(torch.randn(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", ["small-resnet", "vgg11", "torchvision:resnet18"])
def test_ws_touches_no_head(name):
    built = build(name, "bn+ws", shape=(1, 32, 32))
    assert len(built.standardized) == len(built.norms)


def test_ws_needs_convolutions():
    with pytest.raises(
        SpecError, match=r"\+ws has nothing to standardise in model 'mlp'.*resnet18"
    ):
        build("mlp", "bn+ws")


def test_without_a_norm_a_model_keeps_its_own():
    built = build("torchvision:resnet18")
    assert built.norms == ()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in built.model.modules()) == 20


def test_timms_norm_keeps_its_activation():
    plain, ours = (build("timm:regnety_002", n, shape=(3, 32, 32)).model for n in (None, "bn"))
    norms = [m for m in ours.modules() if isinstance(m, BatchNorm)]
    assert any("act" in dict(norm.named_children()) for norm in norms)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-3, atol=1e-4)


def test_replaced_batch_norms_compute_the_same_as_torchs():
    plain, ours = (build("torchvision:resnet18", n).model for n in (None, "bn"))
    x = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-3, atol=1e-4)


def of_layers(*layers):
    """An architecture that is these layers."""

    @dataclasses.dataclass
    class Given:
        def build(self, _task):
            return nn.Sequential(*layers)

    return Given


def test_a_shared_batch_norm_stays_shared(monkeypatch):
    shared = nn.BatchNorm2d(4)
    layers = (nn.Conv2d(1, 4, 1), shared, nn.Conv2d(4, 4, 1), shared)
    monkeypatch.setitem(ARCHITECTURES, "given", of_layers(*layers))
    model = build("given", "bn").model
    assert isinstance(model[1], BatchNorm)
    assert model[1] is model[3]


def test_an_unknown_kind_of_batch_norm_is_refused_by_name(monkeypatch):
    class Strange(nn.BatchNorm2d):
        pass

    layers = (nn.Conv2d(1, 2, 1), Strange(2))
    monkeypatch.setitem(ARCHITECTURES, "given", of_layers(*layers))
    with pytest.raises(ConversionError, match=r"1.*Strange has no rule"):
        build("given", "bn")
    with pytest.raises(ConversionError, match=r"1.*Strange has no rule"):
        norm_slots("given", 10, (1, 8, 8))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "resnet17",
            r"no model 'resnet17'; write small-resnet, mlp, vgg11, .*close names are resnet18",
        ),
        ("torchvision:nope", r"no model 'torchvision:nope'; write"),
        ("timm:densenet121.x", r"no model 'timm:densenet121.x'"),
        (
            "mlp:dept=3",
            r"argument 'dept=3'; it takes depth=N, width=N, each once, with N a whole number",
        ),
        ("mlp:depth=0", r"argument 'depth=0'; it takes"),
        ("vgg11:width", r"model 'vgg11:width' has the argument 'width'; it takes stacked=N"),
    ],
)
def test_a_bad_model_name_says_what_would_do(name, text):
    with pytest.raises(SpecError, match=text):
        build(name)


def test_a_norm_throughout_replaces_all_norms_of_a_model_without_batch_norms():
    built = build("timm:convnext_atto", "gn:max=4", shape=(3, 32, 32))
    assert not any(isinstance(m, nn.LayerNorm) for m in built.model.modules())
    assert len(built.norms) == sum(isinstance(m, GroupNorm) for m in built.model.modules()) > 0
    assert built.model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_model_without_norms_is_refused(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "given", of_layers(nn.Conv2d(1, 4, 1)))
    said = r"'given' has no norm to replace, only Conv2d; .* such as nn.BatchNorm2d.* as resnet18"
    with pytest.raises(SpecError, match=said):
        build("given", "bn")


def test_pictures_that_are_too_small_are_refused():
    with pytest.raises(SpecError, match=r"'inception_v3' cannot take inputs of shape \(1, 8, 8\) "):
        build("inception_v3", "bn", shape=(1, 8, 8))


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(PartitionError, match=r"16.*7 groups.*choose a divisor: \[1, 2, 4, 8, 16\]"):
        build("small-resnet", "gn:7")


def test_a_model_name_cannot_be_registered_twice():
    with pytest.raises(SpecError, match=r"model 'mlp' is already registered"):
        architecture("mlp")(ARCHITECTURES["mlp"])


def test_ibn_stands_where_ibn_net_a_has_it():
    """Pan et al. 2018: the first norm of each block, in all stages but the last."""
    model = build("torchvision:resnet18", "ibn", shape=(3, 32, 32)).model
    first = {f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in (0, 1)}
    found = {name for name, m in model.named_modules() if isinstance(m, InstanceBatchNorm)}
    assert found == first
    norms = [m for n, m in model.named_modules() if isinstance(m, BatchNorm) and ".batch" not in n]
    assert len(norms) == 20 - len(first)
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())


def test_ibn_says_what_stands_where_and_keeps_its_options():
    built = build("small-resnet:blocks=2", "ibn:ratio=0.25+ws", shape=(1, 16, 16))
    assert {place.name: place.norm for place in built.norms} == {
        "1": "bn+ws",
        "3.norm1": "ibn:ratio=0.25+ws",
        "3.norm2": "bn+ws",
        "4.norm1": "ibn:ratio=0.25+ws",
        "4.norm2": "bn+ws",
        "5.norm1": "bn+ws",
        "5.norm2": "bn+ws",
        "6.norm1": "bn+ws",
        "6.norm2": "bn+ws",
    }
    assert built.model[3].norm1.ratio == 0.25
    assert is_parametrized(built.model[3].conv1)


@pytest.mark.parametrize("name", ["mlp:depth=2:width=8", "vgg11"])
def test_ibn_needs_residual_blocks(name):
    said = "ibn-a stands where IBN-Net-a has it, in the first norm of "
    with pytest.raises(SpecError, match=said):
        build(name, "ibn")
    with pytest.raises(SpecError, match="choose another norm or a residual network"):
        norm_slots(name, 10, (1, 16, 16)).check("ibn", 4, 4)


def test_ibn_is_tried_at_its_places_alone():
    norm_slots("small-resnet", 10, (1, 4, 4)).check("ibn", 2, 2)  # maps of 1x1 in the last stage


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("small-resnet:width=99999999999", "'width=99999999999'; it takes width=N, blocks=N, "),
        ("small-resnet:stages=9", "small-resnet was given stages=9; give 1 to 8"),
        ("mlp:depth=100000000", "with N a whole number from 1 to 2048"),
        ("mlp:depth=" + "9" * 5000, "a model's name of 5010 characters was given, 'mlp:depth=9999"),
        ("mlp:depth=" + "9" * 300, "with N a whole number from 1 to 2048"),
        ("mlp:depth=\N{ARABIC-INDIC DIGIT TWO}", "with N a whole number from 1 to 2048"),
        ("mlp:depth=1_0", "with N a whole number from 1 to 2048"),
        ("mlp:depth=2:depth=3", "'depth=3'; it takes depth=N, width=N, each once"),
        ("mlp:width=", "with N a whole number from 1 to 2048"),
        ("vgg11:width=2", "has the argument 'width=2'; it takes stacked=N"),
        ("x" * 100_000, "a model's name of 100000 characters was given"),
        ("timm:" + "x" * 300, "there is no model 'timm:xxx"),
        ("\x1b[31mresnet", r"there is no model '\\x1b\[31mresnet'"),
    ],
    ids=lambda value: value[:30],
)
def test_names_and_numbers_of_models_have_bounds(name, text):
    with pytest.raises(SpecError, match=text) as refused:
        build(name)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "given", [0, -1, 2.5, "10", None, True, 10**7, 10**30, 10**5000], ids=lambda n: str(type(n))
)
def test_numbers_of_classes_have_bounds(given):
    with pytest.raises((SpecError, OptionError), match=r"num_classes=|given as num_cl"):
        build_model("small-resnet", num_classes=given, input_shape=(1, 8, 8))


@pytest.mark.parametrize(
    "given", [(1, 999_999_999, 3), (10**6, 8, 8), (1, 8), (1, 8, 8, 8), (1, 0, 8), (1, 2.5, 8)]
)
def test_shapes_of_inputs_have_bounds(given):
    with pytest.raises((SpecError, OptionError), match=r"shape .* values$|input_shape="):
        build("small-resnet", shape=given)


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_made(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**30 // 4096}
    monkeypatch.setattr("os.sysconf", sizes.get)
    bytes_needed = 4 * (64 * 64 * 2048 + 255 * 2048 * 2048 + 256 * 2 * 2048 + 2048 * 10 + 10)
    said = rf"would have {bytes_needed / 2**30:.3g} GiB of weights .* a quarter of this .* 1 GiB"
    with pytest.raises(SpecError, match=said):
        build("mlp:depth=256:width=2048", shape=(1, 64, 64))
