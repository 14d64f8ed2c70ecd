"""What is left as it is, and why; each of these would be wrong or lost if it were folded."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import normkit as nk
from convert.networks import timm
from fold.trained import model_of, randn, trained

X = randn(2, 6, 7, 5)


def conv(*args, **kwargs):
    return nn.Conv2d(6, *(args or (8, 3)), **kwargs)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def weighed(alpha):
    norm = nk.BatchNorm(8)
    norm.example_weight = alpha
    return norm


class Unknown(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


def overridden(module):
    inner = module.forward
    module.forward = lambda x: inner(x).abs()
    return module


class Packed(nn.Parameter):
    """A weight that is stored in another way, as quantised ones are."""


def packed(layer):
    layer.weight = Packed(layer.weight.detach())
    return layer


OWN = "it evaluates by each example's own statistics"
NONE = "it keeps no running statistics: it evaluates by the batch's own"
NORMS = {
    "group norm": (nn.GroupNorm(4, 8), OWN),
    "our group norm": (nk.GroupNorm(8, num_groups=4), OWN),
    "layer norm": (nn.LayerNorm(3), OWN),
    "positional norm": (nk.PositionalNorm(8), "parts of it evaluate by each example's own"),
    "instance norm": (nn.InstanceNorm2d(8), OWN),
    "our instance norm": (nk.InstanceNorm(8), OWN),
    "untracked": (nn.BatchNorm2d(8, track_running_stats=False), NONE),
    "ours untracked": (nk.GhostBatchNorm(8, track_running_stats=False), NONE),
    "group plus": (nk.GroupNormPlus(8, num_groups=4), "parts of it evaluate by each example's own"),
    "switchable": (nk.SwitchableNorm(8), "parts of it evaluate by each example's own"),
    "instance and batch": (nk.InstanceBatchNorm(8), "parts of it evaluate by each example's own"),
    "example weight": (weighed(0.25), "example_weight=0.25 mixes in each example's own"),
    "tracked group norm": (
        nk.GroupNorm(8, num_groups=4, track_running_stats=True),
        "example_weight=1 mixes in each example's own",
    ),
    "batch channel norm, weighed": (
        nk.BatchChannelNorm(8, num_groups=4, example_weight=0.5),
        "example_weight=0.5 mixes in",
    ),
    "groups within channels": (
        nk.BatchGroupNorm(8, num_groups=24),
        "its 24 groups cut through the 8 channels",
    ),
    "groups across channels": (
        nk.BatchGroupNorm(8, num_groups=3),
        "its 3 groups cut through the 8 channels",
    ),
    "no rule": (Unknown(8), "Unknown has no rule; register one with normkit.convert.rule"),
    "forward replaced": (overridden(nn.BatchNorm2d(8)), "its forward was replaced"),
    "hooks": (hooked(nn.BatchNorm2d(8)), "it has hooks"),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_is_no_scale_and_shift(name):
    norm, why = NORMS[name]
    reasons(model_of(conv(), norm), {"1": why})


def reasons(model, expected, x=X):
    """These norms alone are left, for these reasons, and the output is what it was."""
    with torch.no_grad():  # also for hooks that compute weights: torch could not copy their graph
        before = model(x)
    done = nk.fold(model, x)
    left = {row.name: row.why for row in done.left}
    assert left.keys() == expected.keys()
    for name, why in expected.items():
        assert why in left[name]
        assert why in str(done)
    torch.testing.assert_close(done.model(x), before, rtol=1e-11, atol=1e-11)
    return done


def test_a_scale_that_is_not_finite():
    model = model_of(conv(), nn.BatchNorm2d(8, eps=0))
    model[1].running_var[3] = 0
    (left,) = nk.fold(model, X).left
    assert left.why == "its scale or shift is not finite"


def test_a_product_that_the_dtype_cannot_hold():
    model = model_of(conv(bias=False), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[0].weight.mul_(1e306)
        model[1].weight.fill_(1e3)
        model[1].running_var.fill_(1e300)
        model[1].weight[0] = 1e300
    reasons(model, {"1": "'0' cannot hold the product in its dtype"}, X * 1e-306)


LAYERS = {
    "hooks": (hooked(conv()), "'0' cannot absorb it: it has hooks"),
    "spectral norm": (parametrizations.spectral_norm(conv()), "its weight is parametrised"),
    "spectral norm by hook": (spectral_norm(conv()), "it has hooks"),
    "pruned": (prune.l1_unstructured(conv(), "weight", amount=3), "it has hooks"),
    "another forward": (OwnConv(6, 8, 3), "fold.test_left.OwnConv)"),
    "forward replaced": (overridden(conv()), "it has its own forward"),
    "standardised by timm": (
        timm.layers.StdConv2d(6, 8, 3),
        "it has its own forward (timm.layers.std_conv.StdConv2d)",
    ),
    "no plain weight": (packed(conv()), "its weight is not a plain parameter"),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_whose_weights_are_not_its_own(name):
    layer, why = LAYERS[name]
    model = trained(nn.Sequential(layer, nn.BatchNorm2d(8)).double())
    reasons(model, {"1": why})


def test_tied_weights():
    one, two = conv(), conv()
    two.weight = one.weight
    model = model_of(Sum(nn.Sequential(one, nn.BatchNorm2d(8)), nn.Sequential(two)))
    reasons(model, {"0.parts.0.1": "'0.parts.0.0' cannot absorb it: it shares parameters with"})


class Sum(nn.Module):
    """Parts beside each other."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def test_a_layer_that_feeds_two():
    class Forked(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y) + y.mean()

    why = "'0' (Conv2d) feeds 'mean' as well, and its result goes into 'add'"
    reasons(trained(Forked(conv(), nn.BatchNorm2d(8)).double()), {"1": why})


@pytest.mark.parametrize("which", ["norm", "conv"])
def test_a_module_that_is_called_twice(which):
    class Twice(nn.Sequential):
        def forward(self, x):
            one = self[1](self[0](x))
            return one + (self[1](self[2](x)) if which == "norm" else self[0](x))

    why = {"norm": "one forward", "conv": "'0' cannot absorb it: one forward"}[which]
    model = trained(Twice(conv(), nn.BatchNorm2d(8), conv()).double())
    reasons(model, {"1": f"{why} calls it 2 times"})


def test_a_module_that_is_called_twice_where_only_running_shows_it():
    class Looping(nn.Sequential):
        def forward(self, x):
            y = self[1](self[0](x))
            return y if y.sum() > 1e9 else self[1](self[0](x)) - y * 0.5

    model = trained(Looping(conv(), nn.BatchNorm2d(8)).double())
    reasons(model, {"1": "one forward calls it 2 times"})


def test_a_norm_that_is_not_called():
    class Idle(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    reasons(Idle(conv(), nn.BatchNorm2d(8)).double().eval(), {"1": "the forward does not call it"})


def test_a_norm_that_these_arguments_do_not_reach():
    class Optional(nn.Sequential):
        def forward(self, x, raw=None):  # torch.fx follows the default
            return self[1](self[0](x)) if raw is None else self[0](x)

    model = trained(Optional(conv(), nn.BatchNorm2d(8)).double())
    (left,) = nk.fold(model, (X, True)).left
    assert left.why == "the forward does not call it"


def test_parameters_that_the_forward_reads_itself():
    class Reading(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x)) * self[1].weight.mean()

    model = trained(Reading(conv(), nn.BatchNorm2d(8)).double())
    reasons(model, {"1": "the forward reads its parameters directly"})


BEHIND = {
    "padding": (conv(padding=1), "'1' pads with zeros, which the norm's shift does not reach"),
    "same": (conv(8, 3, padding="same"), "'1' pads with zeros"),
    "as in TensorFlow": (timm.layers.Conv2dSame(6, 8, 3), "'1' pads with zeros"),
    "transposed": (nn.ConvTranspose2d(6, 8, 3), "'1' pads with zeros"),
    "strided": (nn.ConvTranspose2d(6, 8, 1, stride=2), "'1' pads with zeros"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_padding_meets_a_shift(name):
    layer, why = BEHIND[name]
    reasons(model_of(nn.BatchNorm2d(6), layer), {"0": f"its input comes from input, and {why}"})


def test_an_activation_on_the_way():
    model = model_of(conv(), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    why = "its input comes from '1' (ReLU), and its result goes into '3' (ReLU)"
    reasons(model, {"2": why})


def test_an_activation_inside():
    model = model_of(timm.layers.BatchNormAct2d(6), conv())
    reasons(model, {"0": "its input comes from input, and its own ReLU comes after it"})


def test_channels_that_are_not_the_layers():
    model = model_of(conv(8, 1), nn.Flatten(2), nn.Unflatten(1, (2, 4)), nn.BatchNorm2d(2))
    assert nk.fold(model, X).left == ()  # a channel of the norm is four of the layer's
    features = model_of(conv(8, 1), nn.Flatten(), nn.BatchNorm1d(8 * 35))  # a norm for each pixel
    reasons(features, {"2": "its channels do not match those of '0'"})
    padded = model_of(conv(8, 1), Pad(), nn.BatchNorm2d(8))
    reasons(padded, {"2": "its input comes from 'pad'"})
    tokens = model_of(nn.Linear(5, 7), nn.Flatten(2), nn.BatchNorm1d(6))
    reasons(tokens, {"2": "its channels do not match those of '0'"})


class Pad(nn.Module):
    """Puts zeros around, which the norm would shift."""

    def forward(self, x):
        return nn.functional.pad(x, (1, 1))


def test_a_linear_layer_over_tokens_has_its_channels_last():
    model = model_of(
        nn.Linear(8, 6), nn.BatchNorm1d(6)
    )  # of 6 tokens, each normalised as a channel
    reasons(model, {"1": "its channels do not match those of '0'"}, randn(2, 6, 8))


def test_an_instance_norm_without_a_batch_axis():
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    model, x = model_of(nn.Conv2d(6, 6, 1), norm), randn(6, 6, 6)
    reasons(model, {}, x)


def test_only_what_evaluates_as_it_is_drops_nothing():
    class Dropping(nn.Sequential):
        def forward(self, x):
            return self[1](nn.functional.dropout(self[0](x), 0.5, training=True))

    model = trained(Dropping(conv(), nn.BatchNorm2d(8)).double())
    (left,) = nk.fold(model, X).left
    assert left.why.startswith("its input comes from 'dropout'")


def test_hooks_on_what_lies_between():
    model = model_of(conv(), hooked(nn.Identity()), nn.BatchNorm2d(8))
    reasons(model, {"2": "its input comes from '1' (Identity)"})


def test_what_is_only_named_like_a_norm():
    class MyNorm(nn.Module):
        def forward(self, x):
            return x / 2

    model = nn.Sequential(OrderedDict(conv=conv(), norm=MyNorm())).double()
    reasons(model, {"norm": "its class name contains 'norm', but normkit does not know the class"})


def test_the_model_itself_may_be_a_norm():
    norm = trained(nn.BatchNorm2d(6).double())
    done = reasons(norm, {"": "its input comes from input, and its result goes into the output"})
    assert done.model is not norm
    assert str(done).startswith("folded 0 of 1 norms; the output differs by 0.0e+00")
    assert "the model itself (BatchNorm2d(6))" in str(done)


def test_a_compiled_model_and_one_without_sizes_are_refused():
    class OptimizedModule(nn.Sequential):
        """Named as what ``torch.compile`` makes."""

    with pytest.raises(nk.OptionError, match="is compiled"):
        nk.fold(OptimizedModule(conv()), X)
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    with pytest.raises(nk.ConversionError, match="layers '0', '1' do not know their sizes yet"):
        nk.fold(lazy, X)


def test_a_model_that_torch_cannot_copy():
    model = nn.Sequential(prune.l1_unstructured(conv(), "weight", amount=3), nn.BatchNorm2d(8))
    with pytest.raises(
        nk.ConversionError, match=r"cannot be copied .*; if a hook computes weights"
    ):
        nk.fold(model.double(), X)


def test_weights_that_others_parametrise_as_well():
    model = model_of(conv(), nn.BatchNorm2d(8))
    nk.standardize_weights_(model)
    parametrizations.spectral_norm(model[0])
    with pytest.raises(nk.WeightError, match=r"parametrised by .*; remove the others first"):
        nk.fold(model, X)


def test_a_forward_that_reads_a_norm_is_refused_with_the_way_out():
    class Reading(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x)) * self[1].running_var.mean().item()

    model = trained(Reading(conv(), nn.BatchNorm2d(8)).double())
    with pytest.raises(
        nk.ConversionError, match=r"fails on the example input \(AttributeError: .*hook"
    ):
        nk.fold(model, X)
    hooked(model[1])
    reasons(model, {"1": "it has hooks"})


def test_a_difference_that_is_no_rounding_is_refused():
    class Hidden(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y) * (1 + float(self[0].weight.detach().numpy().sum()))

    model = trained(Hidden(conv(), nn.BatchNorm2d(8)).double())
    with pytest.raises(nk.ConversionError, match=r"differs by .* of its largest value .* rounding"):
        nk.fold(copy.deepcopy(model), X)
