"""Which norms are selected, and what is refused before anything changes."""

import pytest
import torch
from torch import nn

import normkit as nk
from convert.net import Net

NAMES = ["layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.bn2", "head.1"]


def converted(spec, **options):
    done = nk.convert_norm(Net(), spec, **options)
    return {change.name: change.new for change in done.changes}


def left(spec, **options):
    return {row.name: row.why for row in nk.convert_norm(Net(), spec, **options).left}


def test_one_spec_is_for_all():
    assert converted("gn:4") == dict.fromkeys(NAMES, "gn:4")
    assert converted(nk.NormSpec.parse("gn:4")) == dict.fromkeys(NAMES, "gn:4")


def test_the_first_pattern_that_matches_counts():
    wanted = {"layer1.*": "bn", "re:.*bn2": nk.NormSpec.parse("gn:2"), "head": None, "*": "in"}
    assert converted(wanted) == {
        "layer1.0.bn1": "bn",
        "layer1.0.bn2": "bn",
        "layer2.0.bn1": "in",
        "layer2.0.bn2": "gn:2",
    }
    assert left(wanted) == {"head.1": "'head' leaves it alone"}


def test_what_no_pattern_names_is_left_and_said():
    assert left({"layer1": "gn:2"}) == dict.fromkeys(NAMES[2:], "no pattern names it")


def test_where_is_asked_about_every_norm():
    seen = []

    def where(module, name):
        seen.append((type(module), name))
        return name.endswith("bn1")

    assert list(converted("gn:2", where=where)) == ["layer1.0.bn1", "layer2.0.bn1"]
    assert [name for _, name in seen] == NAMES
    assert seen[-1][0] is nn.BatchNorm1d
    assert left("gn:2", where=where)["head.1"] == "where= leaves it out"


def test_twice_is_once():
    model = Net()
    first = nk.convert_norm_(model, "gn:max=3")
    modules = dict(model.named_modules())
    second = nk.convert_norm_(model, "gn:max=3")
    assert len(first.changes) == 5
    assert second.changes == ()
    assert {row.why for row in second.left} == {"it is gn:max=3 already"}
    assert all(modules[name] is module for name, module in model.named_modules())


@pytest.mark.parametrize("spec", ["bn", "bcn:4", "bcn:4:micro", "sn", "ibn", "gnplus:2", "gw:2"])
def test_twice_is_once_for_every_norm(spec):
    model = nk.convert_norm(Net().layer1, spec).model
    assert nk.convert_norm_(model, spec).changes == ()


def test_a_model_that_is_itself_a_norm():
    done = nk.convert_norm_(nn.BatchNorm2d(8), {"*": "gn:2"})
    assert isinstance(done.model, nk.GroupNorm)
    assert "the model itself" in str(done)
    assert isinstance(done.revert(), nn.BatchNorm2d)
    assert isinstance(done.model, nn.BatchNorm2d)


def test_a_dry_run_only_says():
    model = Net()
    modules, state = dict(model.named_modules()), list(model.state_dict())
    done = nk.convert_norm_(model, "gn:4+ws", dry_run=True)
    assert str(done).startswith("would convert 5 of 5 norms\n")
    assert done.model is model
    assert len(done.standardized) == 4
    assert done.revert() is model
    assert list(model.state_dict()) == state
    assert all(modules[name] is module for name, module in model.named_modules())


def test_auto_takes_the_batch_size():
    assert converted("bgn:auto", batch_size=4)["layer1.0.bn1"] == "bgn:2"
    with pytest.raises(
        nk.SpecError, match=r"5 layers cannot .*\n.*head.1 to bgn:auto: .*batch_size="
    ):
        converted("bgn:auto")


def test_what_looks_like_a_norm_is_not_passed_over_in_silence():
    class SimpleNorm(nn.Module):
        def forward(self, x):
            return x / x.std()

    model = nn.Sequential(nn.BatchNorm2d(8), SimpleNorm())
    (row,) = nk.convert_norm_(model, "gn:2").left
    assert (row.name, row.old) == ("1", "SimpleNorm()")
    assert row.why == "its class name contains 'norm', but normkit does not know the class"


def test_norms_in_a_python_list_are_not_passed_over_in_silence():
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)
            self.order = [self.norm]
            self.by_name = {"other": nn.BatchNorm2d(8)}

    model = nn.Sequential(Hiding())
    done = nk.convert_norm_(model, "gn:2")
    assert [change.name for change in done.changes] == ["0.norm"]
    assert model[0].order == [model[0].norm]  # what is called there is what was converted
    why = "it is in a Python list or dict, not an nn.ModuleList"
    assert {row.name: row.why for row in done.left} == {"0.by_name": why}
    assert done.revert()[0].order == [model[0].norm]
    assert isinstance(model[0].norm, nn.BatchNorm2d)


def test_the_report_prints_as_a_table():
    model = nn.Sequential(nn.BatchNorm2d(20), nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8)))
    done = nk.convert_norm_(model, {"1.1": None, "*": "gn:max=8"})
    assert (
        str(done)
        == """\
converted 2 of 3 norms
  name  old              new   carried       lost
  0     BatchNorm2d(20)  gn:5  weight, bias  running statistics
  1.0   BatchNorm1d(8)   gn:8  weight, bias  running statistics
  1.0: 8 groups of one channel each: this is instance norm
  1.0: inputs (N, C) have one value in each group, which the layer refuses in training
left alone, '1.1' leaves it alone: 1.1 (BatchNorm1d(8))"""
    )
    assert repr(done) == "<Conversion: converted 2 of 3 norms>"
    with pytest.raises(nk.PartitionError, match="more than 1 value"):  # as the report said
        model[1][0](torch.randn(4, 8))


def test_groups_that_only_the_map_can_make_fit_are_a_warning():
    (change,) = nk.convert_norm(nn.BatchNorm2d(20), "bgn:8").changes
    assert change.warnings == ("8 groups do not divide 20 channels; the positions must",)


def refused(error, match, spec="gn:2", model=None, **options):
    """The call is refused, and nothing is changed."""
    model = Net() if model is None else model
    modules, state = dict(model.named_modules()), list(model.state_dict())
    with pytest.raises(error, match=match):
        nk.convert_norm_(model, spec, **options)
    assert list(model.state_dict()) == state
    assert all(modules[name] is module for name, module in model.named_modules())


def test_groups_that_do_not_divide_are_refused_for_the_whole_model():
    first = r"5 layers cannot be converted; nothing was changed\n  layer1.0.bn1, layer1.0.bn2, "
    rest = r"layer2.0.bn1, layer2.0.bn2 to gn:8: .* length 20, .*\n  head.1 to gn:8: .* length 324"
    offer = r'(?s:.*)\n"gn:max=8" takes the largest number that divides$'
    model = Net(20)
    model.head[1] = nn.BatchNorm1d(324)
    refused(
        nk.PartitionError, first + rest.replace("\\n  head", r"\n  head") + offer, "gn:8", model
    )
    refused(nk.PartitionError, r'"gn:max=32" takes', "gn", model)
    whole = r'"bcn:max=8:micro_batch\+ws" takes the largest number that divides$'
    refused(nk.PartitionError, whole, "bcn:8:micro+ws", model)
    of_a_size = (
        r'of 20 channels, which 8 does not (?s:.*)\n"gn:max=32:channels=8" takes the largest'
    )
    refused(nk.PartitionError, f"(?s:.*){of_a_size}", "gn:channels=8", model)
    nk.convert_norm_(model, "bcn:max=8:micro_batch")


def test_several_kinds_of_trouble_are_one_error():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Own(8), nn.BatchNorm2d(20))
    refused(nk.ConversionError, r"2 layers (?s:.*)Own has no rule(?s:.*)length 20", "gn:8", model)


def test_patterns_and_options_that_mean_nothing_are_refused():
    refused(nk.OptionError, r"'stem' matches none of the 5 norms; they are: lay", {"stem": "bn"})
    refused(nk.OptionError, r"'re:bn2' matches none", {"re:bn2": "bn"})  # the whole name
    refused(nk.OptionError, "an empty dict was given", {})
    refused(nk.OptionError, r"close names are head.1", {"head.2": "bn"})
    refused(nk.OptionError, r"'re:\(' is not a valid regular expression: ", {"re:(": "bn"})
    refused(nk.OptionError, r"3 was given as a pattern", {3: "bn"})
    refused(nk.OptionError, r"where= chooses none of the 5 norms", where=lambda m, n: False)
    refused(nk.OptionError, r"where='bn1' was given; it must be a function", where="bn1")
    refused(nk.SpecError, r"names norm 'gm'", "gm:2")
    refused(nk.SpecError, r"names norm 'gm'", {"layer1": "gm:2"})
    refused(nk.SpecError, r"3 was given; it must be a spec such as 'gn:32', or a dict", 3)
    refused(nk.OptionError, r"eps=-1", "gn:2:eps=-1.0")
    refused(TypeError, r"optimiser", optimiser=None)
    refused(nk.OptionError, r"no normalization layer", model=nn.Sequential(nn.Conv2d(3, 8, 3)))
    refused(nk.OptionError, r"optimizer= was given a list; it takes a torch\.optim", optimizer=[])


def test_wrapped_and_compiled_models_are_refused():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(Net())
    finally:
        torch.distributed.destroy_process_group()
    says = r"the model is inside DistributedDataParallel, .* convert the model first and wrap"
    refused(nk.OptionError, says, model=wrapped)
    parallel = nn.DataParallel(Net())
    refused(nk.OptionError, "the model is inside DataParallel", model=parallel)
    inside = nn.Sequential(wrapped)
    refused(nk.OptionError, r"module '0' is inside DistributedDataParallel", model=inside)
    compiled = torch.compile(Net(), backend="eager")
    refused(nk.OptionError, r"is compiled \(OptimizedModule\).* compile it afterw", model=compiled)
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.trace(Net().eval(), torch.randn(2, 8, 4, 4))
    refused(nk.OptionError, r"is compiled \(ScriptModule\)", model=scripted)


def test_a_pattern_that_comes_too_late_is_refused():
    says = (
        r"pattern 'layer1\.\*' has no effect: all of its norms match '\*' before it.* put it first"
    )
    with pytest.raises(nk.OptionError, match=says):
        nk.convert_norm_(Net(), {"*": "gn:4", "layer1.*": "in"})
    nk.convert_norm_(Net(), {"*": "gn:4", "layer1.*": "gn:4"})  # says the same
    nk.convert_norm_(Net(), {"layer1.0.bn1": None, "layer1.*": "in", "*": "gn:4"})
