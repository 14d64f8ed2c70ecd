"""Every check finds its defect by name, and not where it is repaired; the model stays as it was."""

import copy
import json

import pytest
import torch
from torch import nn

import normkit as nk
from advice.defects import BN, DEFECTS, conv, trained
from convert.networks import build
from normkit.advice.registry import CHECKS, check

IDS = [f"{row[0]}, {type(row[5]).__name__} {i}" for i, row in enumerate(DEFECTS)]
SOUND = [
    "torchvision:resnet18",
    "timm:mobilenetv2_035",
    "torchvision:mobilenet_v3_small",
    "timm:seresnet18",
    "timm:convnext_atto",
    "timm:mobilevitv2_050",
    "timm:test_vit",
]


def found(model, name, **options):
    return [(f.severity, f.name) for f in nk.validate(model, **options) if f.check == name]


def at_64(model, batch_size=32, **options):
    return nk.validate(model, batch_size=batch_size, input_shape=(3, 64, 64), **options)


@pytest.mark.parametrize(
    ("name", "severity", "at", "batch", "shape", "broken", "repaired"), DEFECTS, ids=IDS
)
def test_a_check_finds_its_defect_and_not_its_repair(
    name, severity, at, batch, shape, broken, repaired
):
    options = {"batch_size": batch, "input_shape": shape}
    assert found(copy.deepcopy(broken), name, **options) == [(severity, at)]
    assert found(copy.deepcopy(repaired), name, **options) == []


def test_every_check_has_a_defect_in_the_tests():
    apart = {"no statistics yet"}  # below: it depends on what is asked
    assert {row[0] for row in DEFECTS} | apart == CHECKS.keys()


@pytest.mark.parametrize("name", SOUND)
def test_sound_networks_raise_no_alarm(name):
    shape = (3, 160, 160) if name == "timm:test_vit" else (3, 64, 64)
    model = build(name)
    found = nk.validate(model, batch_size=32, input_shape=shape)
    assert [f for f in found if f.severity != "note"] == []


def test_small_batches_are_found_in_a_real_network():
    results = at_64(build("torchvision:resnet18"), batch_size=2)
    assert sum(f.check == "few examples" for f in results) == 20
    assert "2 examples, 2048 values" in results[0].what  # of 32 x 32 each


def test_fresh_statistics_matter_by_what_is_asked():
    options = {"batch_size": 32, "input_shape": (3, 8, 8)}
    new = conv(BN(8))
    assert found(new, "no statistics yet", training=True, **options) == []
    assert found(new, "no statistics yet", training=False, **options) == [("warning", "1")]
    part = nn.Sequential(conv(trained(BN(8))), nn.Conv2d(8, 8, 1), BN(8))
    assert found(part, "no statistics yet", training=True, **options) == [("note", "2")]
    assert found(conv(trained(BN(8))), "no statistics yet", training=False, **options) == []


def test_evaluation_alone_leaves_out_what_concerns_training():
    model = conv(BN(8, momentum=None), bias=True)
    model[1].momentum = None
    checks = {f.check for f in at_64(model, batch_size=2, training=False)}
    assert checks == {"no statistics yet"}


def test_a_fitting_model_finds_nothing_and_says_so():
    assert str(at_64(conv(nn.GroupNorm(2, 8)))) == "nothing found"


def test_the_worst_comes_first_then_the_order_of_the_model():
    model = nn.Sequential(conv(BN(8), bias=True), nn.Conv2d(8, 8, 64), nn.InstanceNorm2d(8))
    results = at_64(model, batch_size=2)
    assert [(f.severity, f.name) for f in results] == [
        ("error", "2"),
        ("warning", "0.1"),
        ("note", "0.0"),
        ("note", "1"),
    ]


def test_findings_print_by_kind_and_become_json():
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Conv2d(3, 3, 1), BN(3))])
    results = at_64(model, batch_size=2)
    text = str(results)
    assert "warning: few examples (6 layers)\n  1: training takes" in text
    assert "  and 2 more: 9, 11\n  why: " in text
    assert text.endswith("0 errors, 6 warnings, 6 notes")
    assert json.loads(json.dumps(results.as_list()))[0] == results[0].as_dict()
    assert str(results[0]).splitlines()[0] == "warning: few examples"


def test_a_count_is_of_all_values_that_share_statistics():
    layer = nn.Sequential(nn.Unflatten(1, (4, 2)), nk.BatchNorm(4))
    [finding] = nk.validate(layer, batch_size=9, input_shape=(8,))
    assert "18 values for input (9, 4, 2): the deviation is off by 17%" in finding.what


def test_an_example_input_counts_its_examples():
    x = torch.rand(4, 3, 8, 8)
    for example in (x, (x,), {"input": x}):
        results = nk.validate(conv(BN(8)), batch_size=2, example_input=example)
        assert "2 examples, 128 values" in results[0].what


def test_a_list_of_inputs_is_as_many_examples():
    class OfLists(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BN(3)

        def forward(self, images):
            return self.norm(torch.stack(images))

    results = nk.validate(OfLists(), batch_size=2, example_input=([torch.rand(3, 8, 8)] * 5,))
    assert "2 examples, 128 values" in results[0].what


def test_the_model_is_left_as_it_was():
    model = conv(BN(8)).train()
    model[1].eval()
    hook = model[1].register_forward_hook(lambda *_: None)
    state, hooks = copy.deepcopy(model.state_dict()), dict(model[1]._forward_hooks)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    at_64(model)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model[1]._forward_hooks == hooks
    assert torch.equal(torch.get_rng_state(), before)
    assert "forward" not in model[1].__dict__
    hook.remove()


def test_an_interruption_leaves_the_model_as_it_was():
    model = conv(BN(8)).train()

    def interrupt(*_):
        raise KeyboardInterrupt

    model[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        at_64(model)
    assert all(module.training for module in model.modules())
    assert "forward" not in model[1].__dict__


def test_an_own_forward_of_a_layer_comes_back():
    model = conv(BN(8))
    own = model[1].forward = lambda x: 2 * x
    at_64(model)
    assert model[1].forward is own


def test_models_without_memory_are_checked_too():
    with torch.device("meta"):
        model = build("torchvision:resnet18")
    assert {f.check for f in at_64(model, batch_size=2)} == {"few examples"}


def test_half_precision_is_checked_as_it_is():
    results = at_64(conv(BN(8)).bfloat16())
    assert [f.check for f in results if f.severity == "warning"] == ["16-bit running statistics"]


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_frozen_for_good_is_not_asked_for_examples(training):
    model = conv(trained(BN(8))).train(training)
    nk.freeze_statistics(model)
    assert at_64(model, batch_size=2) == []
    fresh = conv(BN(8)).train(training)
    nk.freeze_statistics(fresh)
    [finding] = at_64(fresh, batch_size=2)
    assert (finding.check, finding.severity) == ("no statistics yet", "warning")


def test_a_fix_of_one_example_has_groups_of_enough_values():
    model = nn.Sequential(nn.Linear(3, 64, bias=False), nn.BatchNorm1d(64))
    [finding] = [
        f for f in nk.validate(model, batch_size=2, input_shape=(3,)) if f.check == "few examples"
    ]
    assert finding.fix.startswith('nk.convert_norm_(model, {"1": "ln"})')


def test_a_frozen_layer_is_not_asked_for_examples():
    model = conv(trained(BN(8)))
    model[1].eval()
    assert [f.check for f in at_64(model, batch_size=2)] == ["frozen for now"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass exactly one of input_shape=, the shape of one example"),
        ({"input_shape": (3, 8, 8), "example_input": 1}, "pass exactly one of input_shape="),
        ({"input_shape": 224}, r"input_shape=224 was given; pass a sequence of sizes"),
        ({"input_shape": (3, 0, 8)}, r"input_shape=0 was given; it counts something"),
    ],
)
def test_inputs_that_are_none_are_refused(options, message):
    with pytest.raises(nk.OptionError, match=message):
        nk.validate(conv(BN(8)), batch_size=32, **options)


@pytest.mark.parametrize("batch_size", [0, -2, 1.5])
def test_batch_sizes_that_are_none_are_refused(batch_size):
    with pytest.raises(nk.OptionError, match=rf"batch_size={batch_size} was given"):
        at_64(conv(BN(8)), batch_size=batch_size)


def test_an_input_that_the_model_does_not_take_is_refused_with_the_way_out():
    message = r"Sequential cannot take an input of shape \(1, 64, 64\).*pass example_input="
    with pytest.raises(nk.InputError, match=message):
        nk.validate(conv(BN(8)), batch_size=32, input_shape=(64, 64))
    with pytest.raises(nk.InputError, match="cannot take the example input, a list"):
        nk.validate(conv(BN(8)), batch_size=32, example_input=["a"])


def test_a_lazy_model_is_refused():
    with pytest.raises(nk.InputError, match=r"1\.weight does not know its shape yet; send one"):
        at_64(conv(nn.LazyBatchNorm2d()))


def test_only_the_norms_that_are_checkpointed_are_named():
    model = build("timm:resnet18")
    model.set_grad_checkpointing(True)
    names = [f.name for f in at_64(model) if f.check == "repeated by checkpointing"]
    assert len(names) == 19  # all but the stem's
    assert "bn1" not in names


def test_a_norm_may_be_called_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BN(3)

        def forward(self, x):
            return self.norm(input=x)

    assert "2 examples, 8192 values" in at_64(ByName(), batch_size=2)[0].what


def test_a_compiled_model_is_refused():
    class OptimizedModule(nn.Module):
        """Stands for ``torch.compile``'s, which takes seconds to import."""

    with pytest.raises(nk.OptionError, match=r"compiled \(OptimizedModule\), and its layers"):
        at_64(OptimizedModule())


def test_a_check_of_the_same_name_is_refused():
    with pytest.raises(nk.OptionError, match="check 'few values' exists already: few_values"):
        check("few values")(lambda situation: iter(()))


@pytest.mark.parametrize(
    ("shape", "batch", "check", "is_found"),
    [
        ((4, 8, 8), 7, "few examples", True),  # 8 is the smallest that loses nothing in table 2
        ((4, 8, 8), 8, "few examples", False),
        ((4, 1, 1), 31, "few values", True),  # 1/sqrt(2 * 32) is an eighth
        ((4, 1, 1), 32, "few values", False),
    ],
)
def test_limits_are_where_they_are_said_to_be(shape, batch, check, is_found):
    model = nn.Sequential(nn.BatchNorm2d(4))
    found = {each.check for each in nk.validate(model, batch_size=batch, input_shape=shape)}
    assert (check in found) == is_found


def test_synchronized_norms_see_the_examples_of_all_processes(monkeypatch):
    model = conv(nn.SyncBatchNorm(8))
    options = {"batch_size": 2, "input_shape": (3, 8, 8)}
    assert found(model, "few examples", **options) == [("warning", "1")]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
    assert found(model, "few examples", **options) == []
