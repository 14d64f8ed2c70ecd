"""Error messages of every layer and function for invalid input."""

import copy
import inspect
import pydoc
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import normkit as nk
from cases import EVERY, MAIN, PLAIN, TOLERANCE
from normkit.layers.base import NormLayer, TrackingLayer
from normkit.layers.options import SharedOptions, TrackingOptions, signature_of

pytestmark = pytest.mark.usefixtures("kernels")
F = nk.functional


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_integers_are_refused(case):
    text = r"was given a tensor of torch.int64; it takes torch.float32, .*; convert it first"
    with pytest.raises(nk.InputTypeError, match=text):
        case.make()(torch.ones(2, 6, 3, dtype=torch.long))


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_other_channels_are_refused(case):
    text = r"num_features=6 channels and was given 5 in a tensor of shape \(2, 5, 3\); .*build it"
    with pytest.raises(nk.InputError, match=text):
        case.make()(torch.ones(2, 5, 3))


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_single_axis_is_refused(case):
    with pytest.raises(nk.InputError, match=r"shape \(6,\); it takes \(N, C, \*S\).*unsqueeze"):
        case.make()(torch.ones(6))


@pytest.mark.parametrize(
    ("layer", "shape", "group"),
    [
        (nk.BatchNorm(6), (1, 6), "1 of 1 examples, 1 of 6 channels, 1 of 1 positions"),
        (nk.InstanceNorm(6), (4, 6, 1, 1), "1 of 4 examples, 1 of 6 channels, 1 of 1 positions"),
        (nk.LayerNorm(1), (4, 1), "1 of 4 examples, 1 of 1 channels, 1 of 1 positions"),
        (nk.GroupNorm(4, num_groups=4), (8, 4), "1 of 8 examples, 1 of 4 channels"),
        (nk.BatchGroupNorm(2, num_groups=6), (1, 2, 3), "1 of 1 examples, .*, 1 of 3 positions"),
        (nk.GhostBatchNorm(6, ghost_batch_size=2), (5, 6), "1 of 5 examples, 1 of 6 channels"),
        (nk.GeneralBatchGroupNorm(6, num_groups=6), (1, 6), "1 of 1 examples, 1 of 6 channels"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_a_group_of_one_value_is_refused_in_training(layer, shape, group):
    name = type(layer).__name__
    text = rf"{name} expected more than 1 value per statistics group when training.*{group}"
    x, layer = torch.ones(shape), copy.deepcopy(layer)
    with pytest.raises(nk.PartitionError, match=text):
        layer(x)
    assert torch.isfinite(layer.eval()(x)).all()


@pytest.mark.parametrize(
    ("layer", "shape", "helps", "useless"),
    [
        (nk.BatchNorm(6), (1, 6), "a larger batch", "a larger map"),
        (nk.InstanceNorm(6), (4, 6, 1, 1), "a larger map; or fewer groups", "batch|eval"),
        (nk.LayerNorm(1), (4, 1), "use inputs with more channels or positions$", "batch|eval"),
        (nk.GroupNorm(4, num_groups=4), (8, 4), r"fewer groups, or .*\(GroupNorm", "batch|map"),
        (nk.GhostBatchNorm(6, ghost_batch_size=2), (5, 6), "no rest of one .* by 2", "larger"),
        (nk.BatchNorm(6), (1, 6, 1), "or .eval", "more channels"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_the_ways_out_of_a_group_of_one_value_help(layer, shape, helps, useless):
    with pytest.raises(nk.PartitionError, match=helps) as error:
        copy.deepcopy(layer)(torch.ones(shape))
    assert not re.search(useless, str(error.value).partition("is a single value")[2])


def test_a_position_of_one_channel_is_refused_in_training():
    layer = nk.PositionalNorm(1)
    with pytest.raises(
        nk.PartitionError, match=r"more than 1 value per position .* single channel"
    ):
        layer(torch.ones(2, 1, 3))
    assert torch.isfinite(layer.eval()(torch.ones(2, 1, 3))).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nk.GroupNorm(6, num_groups=4),
        lambda: nk.GeneralBatchGroupNorm(6, num_groups=4),
        lambda: F.group_norm(torch.ones(2, 6, 3), 4),
        lambda: F.general_batch_group_norm(torch.ones(2, 6, 3), 4, training=True),
    ],
)
def test_groups_that_do_not_divide_the_channels_are_refused_with_the_divisors(make):
    text = r"channel axis has length 6, which 4 groups do not divide; .* divisor: \[1, 2, 3, 6\]"
    with pytest.raises(nk.PartitionError, match=text) as caught:
        make()
    assert isinstance(caught.value, ValueError)


def test_groups_that_do_not_divide_the_map_are_refused_with_the_divisors():
    text = r"example of shape \(6, 2\) has 12 elements, which 5 groups .*\[1, 2, 3, 4, 6, 12\]"
    with pytest.raises(nk.PartitionError, match=text):
        nk.BatchGroupNorm(6, num_groups=5)(torch.ones(2, 6, 2))


def test_many_divisors_are_shortened():
    with pytest.raises(nk.PartitionError, match=r"\[1, 2, 3, .*, \.\.\., 45360\]"):
        nk.GroupNorm(45360, num_groups=45359)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_features": 0}, "num_features=0 was given; it counts"),
        ({"num_features": 6, "eps": -1.0}, r"eps=-1.0 was given; .* >= 0"),
        ({"num_features": 6, "momentum": 1.5}, "momentum=1.5 was given; .* lies from 0 to 1"),
        ({"num_features": 6, "example_weight": 2}, "example_weight=2 was given; .* from 0 to 1"),
    ],
)
def test_impossible_options_are_refused(options, text):
    with pytest.raises(nk.OptionError, match=text):
        nk.BatchNorm(**options)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nk.GhostBatchNorm(6, ghost_batch_size=0), "ghost_batch_size"),
        (lambda: nk.BatchGroupNorm(6, num_groups=0), "num_groups"),
        (lambda: nk.GeneralBatchGroupNorm(6, num_groups=2, examples_per_group=0), "examples_per"),
    ],
)
def test_counts_below_one_are_refused(make, name):
    with pytest.raises(nk.OptionError, match=f"{name}.*=0 was given"):
        make()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_layer_half_on_another_device_is_refused(name, training):
    layer = nk.BatchNorm(6).train(training)
    held = layer._parameters if name in layer._parameters else layer._buffers
    moved = held[name].detach().to("meta")
    held[name] = torch.nn.Parameter(moved) if name in layer._parameters else moved
    with pytest.raises((RuntimeError, NotImplementedError), match=r"device|meta"):
        layer(torch.randn(4, 6, 5))


@pytest.mark.parametrize("value", ["6", None, 6.0, True])
def test_a_count_is_a_whole_number(value):
    text = "was given; it counts something, so it is a whole number, at least 1"
    with pytest.raises(nk.OptionError, match=text):
        nk.BatchNorm(value)
    with pytest.raises(nk.OptionError, match=text):
        nk.GroupNorm(6, num_groups=value)
    with pytest.raises(nk.OptionError, match=text):
        nk.GhostBatchNorm(6, ghost_batch_size=value)


def test_a_numpy_count_becomes_an_int():
    layer = nk.GroupNorm(np.int64(6), num_groups=np.int32(3))
    assert repr(layer).startswith("GroupNorm(6, num_groups=3, ")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: F.ghost_batch_norm(x, 0, training=True), "ghost_batch_size=0 was given"),
        (lambda x: F.general_batch_group_norm(x, 3, 0, training=True), "examples_per_group=0"),
        (lambda x: F.batch_group_norm(x, -1, training=True), "num_groups=-1 was given"),
        (lambda x: F.batch_norm(x, training=True, eps=-1.0), "eps=-1.0 was given"),
        (lambda x: F.batch_norm(x, training=True, eps=float("inf")), "eps=inf was given"),
        (lambda x: F.batch_norm(x, training=True, momentum=7.0), "momentum=7.0 was given"),
        (lambda x: F.layer_norm(x, eps=float("nan")), "eps=nan was given"),
    ],
)
def test_functions_refuse_what_layers_refuse(call, text):
    with pytest.raises(nk.OptionError, match=text):
        call(torch.ones(4, 6, 3))


@pytest.mark.parametrize("function", ["batch_norm", "instance_norm", "layer_norm"])
def test_functions_look_at_the_input_first(function):
    with pytest.raises(nk.InputError, match=r"shape \(\); it takes \(N, C, \*S\)"):
        getattr(F, function)(torch.tensor(1.0))


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_what_is_no_dense_tensor_is_refused(case):
    with pytest.raises(nk.InputTypeError, match=r"given a list; it takes a torch\.Tensor"):
        case.make()([1.0])
    with pytest.raises(nk.InputTypeError, match=r"layout torch.sparse_coo; .*x.to_dense\(\)"):
        case.make()(torch.eye(6).to_sparse())


def test_groups_that_do_not_divide_name_the_nearest_that_do():
    text = r"\(max=32 in a spec, or largest_divisor\(20, 32\), is 20\)"
    with pytest.raises(nk.PartitionError, match=text):
        nk.GroupNorm(20)


def test_a_misspelt_option_is_refused_with_the_known_ones():
    text = (
        r"GroupNorm was given num_group=, .* num_groups, eps, .* dtype; did you mean num_groups\?"
    )
    with pytest.raises(nk.ArgumentError, match=text) as error:
        nk.GroupNorm(6, num_group=3)
    assert isinstance(error.value, TypeError)
    with pytest.raises(nk.ArgumentError, match=r"PositionalNorm was given momentum=, .* dtype$"):
        nk.PositionalNorm(6, momentum=0.1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nk.GroupNorm(8, 64), "GroupNorm(64, num_groups=8)"),
        (lambda: nk.GroupNorm(64, 8), "GroupNorm(64, num_groups=8)"),
        (lambda: nk.GroupNorm(8, 64, 1e-6), "GroupNorm(64, num_groups=8, eps=1e-06)"),
        (lambda: nk.BatchNorm(64, 1e-5, 0.2), "BatchNorm(64, eps=1e-05, momentum=0.2)"),
        (lambda: nk.SwitchableNorm(64, False), "SwitchableNorm(64, use_batch=False)"),
    ],
)
def test_a_call_in_the_order_of_torch_is_told_what_to_write(make, text):
    with pytest.raises(nk.ArgumentError, match=f"all others have names: write {re.escape(text)}$"):
        make()


def test_a_constructor_of_a_subclass_may_take_what_it_likes():
    class Scaled(nk.GroupNorm):
        def __init__(self, num_features, factor, *, num_groups=2, **shared):
            super().__init__(num_features, num_groups=num_groups, **shared)
            self.factor = factor

    assert Scaled(6, 2.0, eps=0.1).eps == 0.1
    with pytest.raises(TypeError, match="epsilon"):
        Scaled(6, 2.0, epsilon=0.1)
    assert list(inspect.signature(Scaled).parameters)[:4] == [
        "num_features", "factor", "num_groups", "eps"
    ]  # fmt: skip


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_the_signature_names_every_option(case):
    signature = inspect.signature(case.layer)
    known = signature.parameters
    assert {"num_features", "eps", "affine", "bias", "device", "dtype"} <= known.keys()
    assert not any(p.kind is p.VAR_KEYWORD for p in known.values())
    layer = case.layer(6, **{"num_groups": 3} if "num_groups" in known else {})
    for name in known.keys() - {"num_features", "device", "dtype"}:
        assert layer.option(name) == known[name].default or name == "num_groups"
    assert list(inspect.signature(layer).parameters) == ["args", "kwargs"]  # as of any module
    assert str(signature)[:40] in pydoc.render_doc(case.layer, renderer=pydoc.plaintext)


def test_shared_options_are_those_of_the_base_classes():
    for options, base in ((SharedOptions, NormLayer), (TrackingOptions, TrackingLayer)):
        assert list(options.__annotations__) == list(signature_of(base).parameters)[1:]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_function_is_the_layer(case):
    layer = case.make()
    function = getattr(F, FUNCTIONS[case.name])
    x = torch.randn(4, 6, 5, 3)
    options = {} if not case.tracks else {"training": True}
    y = function(x, **case.options, weight=layer.weight, bias=layer.bias, **options)
    assert_close(y, layer(x), **TOLERANCE[torch.float32])


FUNCTIONS = {
    "bn": "batch_norm",
    "in": "instance_norm",
    "ln": "layer_norm",
    "gn": "group_norm",
    "pn": "positional_norm",
    "bgn": "batch_group_norm",
    "ghost": "ghost_batch_norm",
    "gbgn": "general_batch_group_norm",
}


def call_with_the_state_of(layer, x, training):
    """The function of a composite, or of whitening, with what the layer holds."""
    name, shared = type(layer).__name__, {"training": training}
    affine = {key: getattr(layer, key, None) for key in ("weight", "bias")}  # or its stages have it
    if name == "GroupWhitening":
        return F.group_whitening(x, layer.num_groups, **affine)
    if name == "InstanceBatchNorm":
        norms = (layer.instance, layer.batch)
        affine = {key: torch.cat([getattr(n, key) for n in norms]) for key in affine}
        return F.instance_batch_norm(x, *buffers_of(layer.batch), **affine, **shared)
    if name == "BatchChannelNorm":
        affine = [p for stage in (layer.batch, layer.channel) for p in (stage.weight, stage.bias)]
        rate = layer.update_rate if layer.micro_batch else None
        buffers = buffers_of(layer.batch)
        return F.batch_channel_norm(
            x, layer.num_groups, *buffers, *affine, update_rate=rate, **shared
        )
    if name == "SwitchableNorm":
        logits = (layer.mean_logits, layer.var_logits)
        return F.switchable_norm(x, *logits, *buffers_of(layer), **affine, **shared)
    return F.group_norm_plus(
        x, layer.num_groups, layer.mix_logit, *buffers_of(layer), **affine, **shared
    )


def buffers_of(layer):
    return layer.running_mean, layer.running_var


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [c for c in MAIN if c not in PLAIN], ids=str)
def test_the_function_of_a_composite_is_the_layer(case, training):
    layer = case.make().train(training)
    x, before = torch.randn(4, 6, 5, 3), copy.deepcopy(layer)
    y = call_with_the_state_of(layer, x, training)
    assert_close(y, before(x), **TOLERANCE[torch.float32])
    counts = [name for name in layer.state_dict() if name.endswith("num_batches_tracked")]
    for name, value in layer.state_dict().items():  # the buffers moved alike
        if name not in counts:
            assert_close(value, before.state_dict()[name], **TOLERANCE[torch.float32])


def test_whitening_of_a_single_value_is_refused_by_function_and_layer():
    for call in (nk.GroupWhitening(4, num_groups=4), lambda x: F.group_whitening(x, 4)):
        with pytest.raises(nk.PartitionError, match="expected more than 1 value per statistics"):
            call(torch.ones(2, 4))


def test_a_function_updates_and_uses_the_buffers_it_is_given():
    x, mean, var = torch.randn(4, 6, 3), torch.zeros(6), torch.ones(6)
    torch_mean, torch_var = mean.clone(), var.clone()
    for training in (True, False):
        ours = F.batch_norm(x, mean, var, training=training, momentum=0.3)
        theirs = torch.nn.functional.batch_norm(
            x, torch_mean, torch_var, training=training, momentum=0.3
        )
        assert_close(ours, theirs, **TOLERANCE[torch.float32])
    assert_close(mean, torch_mean)
    assert_close(var, torch_var)


def test_batch_group_norm_function_has_a_buffer_for_each_group():
    x, mean, var = torch.randn(4, 6, 3), torch.zeros(9), torch.ones(9)
    y = F.batch_group_norm(x, 9, mean, var, training=True)
    layer = nk.BatchGroupNorm(6, num_groups=9)
    assert_close(y, layer(x))
    assert_close(mean, layer.running_mean)


def test_a_function_without_statistics_says_so():
    with pytest.raises(
        nk.InputError, match="batch_norm was called with training=False and without"
    ):
        F.batch_norm(torch.ones(2, 6))


def test_running_statistics_come_in_pairs_of_the_right_shape():
    text = r"shapes \(6,\) and None; pass both, of shape \(6,\), or neither"
    with pytest.raises(nk.InputError, match=text):
        F.batch_norm(torch.ones(2, 6), torch.ones(6))
    with pytest.raises(nk.InputError, match=r"\(5,\) and \(6,\); pass both, of shape \(6,\)"):
        F.batch_norm(torch.ones(2, 6), torch.ones(5), torch.ones(6))


def test_a_weight_of_another_length_is_refused():
    text = r"layer_norm was given weight of shape \(5,\) for 6 channels; .* shape \(6,\)"
    with pytest.raises(nk.InputError, match=text):
        F.layer_norm(torch.ones(2, 6), torch.ones(5))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda x: nk.functional.batch_norm(x, traning=True),
            r"batch_norm .* did you mean training",
        ),
        (lambda x: nk.functional.group_norm(x, 2, training=True), r"training=, .* options: eps, "),
    ],
)
def test_a_function_names_an_option_that_it_does_not_take(call, said):
    with pytest.raises(nk.ArgumentError, match=said):
        call(torch.randn(2, 4, 3))


def test_functions_show_every_option_to_help():
    parameters = inspect.signature(nk.functional.ghost_batch_norm).parameters
    assert [*parameters][6:] == [*nk.functional.StatisticsOptions.__annotations__]
    assert (parameters["momentum"].default, parameters["training"].default) == (0.1, False)
